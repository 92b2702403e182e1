"""The first schema

Revision: 0012
Follows:

Triggers keep what was said as it was said, and splits as they were drawn. On SQLite, whoever
makes a table anew (``batch_alter_table``) loses its triggers and has to make them again.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = None
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INT = sa.Integer()
FLOAT = sa.Float(precision=53)
MOMENT = sa.DateTime(timezone=True)
JSON = sa.JSON()
TEXT = sa.Text()
NAME = sa.String(length=255)
SHA256 = sa.String(length=64)
WORD = sa.String(length=20)

SCHEMA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Columns = list[sa.Column[Any]]


def given(kind: sa.types.TypeEngine[Any], *names: str, **options: Any) -> Columns:
    """Return columns that always have a value."""
    return [sa.Column(name, kind, nullable=False, **options) for name in names]


def maybe(kind: sa.types.TypeEngine[Any], *names: str, **options: Any) -> Columns:
    """Return columns that may be null."""
    return [sa.Column(name, kind, **options) for name in names]


def identity() -> Columns:
    return given(BIG_ID, "id", primary_key=True)


def refers(column: str, other: str, *, nullable: bool = False, **options: Any) -> Columns:
    return [sa.Column(column, BIG_ID, sa.ForeignKey(f"{other}.id"), nullable=nullable, **options)]


def only(condition: str) -> dict[str, Any]:
    """Make an index one of those rows alone that meet ``condition``."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def table(name: str, *parts: Columns | sa.Constraint | sa.Index) -> None:
    flat: list[Any] = []
    for part in parts:
        flat += part if isinstance(part, list) else [part]
    sa.Table(name, SCHEMA, *flat)


table(
    "annotations",
    identity(),
    given(WORD, "level"),
    given(BIG_ID, "row_id"),
    given(WORD, "kind"),
    maybe(NAME, "field"),
    maybe(TEXT, "value", "reason"),
    given(NAME, "user_name"),
    given(MOMENT, "created_at"),
    refers("undoes_id", "annotations", nullable=True, index=True),
    sa.Index(None, "level", "row_id"),
)
table(
    "artifacts",
    identity(),
    given(WORD, "kind"),
    given(TEXT, "path"),
    given(SHA256, "sha256"),
    given(BIG_ID, "size_bytes"),
    given(MOMENT, "created_at"),
    sa.UniqueConstraint("path"),
    sa.UniqueConstraint("sha256", "kind"),
)
table("folders", identity(), given(TEXT, "uri"), sa.UniqueConstraint("uri"))
table(
    "labels",
    identity(),
    given(NAME, "field"),
    given(TEXT, "value"),
    sa.UniqueConstraint("field", "value"),
)
table(
    "perturbations",
    identity(),
    given(WORD, "kind"),
    given(NAME, "name", index=True),
    maybe(NAME, "identifier", index=True),
    maybe(TEXT, "target"),
    maybe(NAME, "inchikey"),
    maybe(TEXT, "smiles"),
    maybe(NAME, "pubchem_cid"),
    sa.UniqueConstraint("kind", "name", "identifier"),
    sa.Index(
        "uq_perturbations_without_identifier",
        "kind",
        "name",
        unique=True,
        **only("identifier IS NULL"),
    ),
)
table(
    "plates",
    identity(),
    given(NAME, "barcode"),
    maybe(NAME, "batch", "cell_line", "time_point"),
    maybe(JSON, "metadata"),
    sa.UniqueConstraint("barcode"),
)
table(
    "recipes",
    identity(),
    given(WORD, "stage"),
    given(INT, "version"),
    given(JSON, "parameters"),
    maybe(SHA256, "weights_sha256"),
    given(SHA256, "fingerprint"),
    given(MOMENT, "created_at"),
    sa.UniqueConstraint("stage", "fingerprint"),
)
table(
    "treatments",
    identity(),
    given(TEXT, "identity"),
    given(TEXT, "name", index=True),
    given(TEXT, "name_with_dose"),
    maybe(TEXT, "target"),
    given(sa.BigInteger(), "perturbations_key"),
    sa.UniqueConstraint("identity"),
)
table(
    "feature_sets",
    identity(),
    given(NAME, "name"),
    refers("recipe_id", "recipes"),
    given(JSON, "columns"),
    given(WORD, "storage"),
    sa.UniqueConstraint("name"),
    sa.UniqueConstraint("recipe_id"),
)
table(
    "recipe_inputs",
    refers("recipe_id", "recipes", primary_key=True),
    refers("input_id", "recipes", primary_key=True, index=True),
)
table(
    "splits",
    identity(),
    given(NAME, "name"),
    refers("recipe_id", "recipes"),
    given(NAME, "protocol", "field"),
    given(WORD, "group_level"),
    given(INT, "seed"),
    given(TEXT, "query"),
    given(SHA256, "fingerprint"),
    given(JSON, "excluded"),
    given(MOMENT, "created_at"),
    maybe(MOMENT, "frozen_at"),
    maybe(NAME, "family"),
    maybe(INT, "fold"),
    sa.UniqueConstraint("name"),
)
table(
    "treatment_parts",
    refers("treatment_id", "treatments", primary_key=True),
    given(INT, "position", primary_key=True, autoincrement=False),
    refers("perturbation_id", "perturbations", index=True),
    maybe(FLOAT, "dose"),
    maybe(NAME, "dose_unit", "dose_original"),
)
table(
    "wells",
    identity(),
    refers("plate_id", "plates"),
    given(INT, "well_row", "well_column"),
    given(NAME, "name"),
    refers("treatment_id", "treatments", nullable=True, index=True),
    maybe(WORD, "control"),
    maybe(JSON, "metadata"),
    sa.UniqueConstraint("plate_id", "well_row", "well_column"),
)
table(
    "images",
    identity(),
    refers("well_id", "wells"),
    given(INT, "site", "plane", "time_point"),
    given(NAME, "core_name", index=True),
    maybe(SHA256, "content_sha256"),
    maybe(FLOAT, "pixel_size"),
    sa.UniqueConstraint("well_id", "site", "plane", "time_point"),
    sa.Index(None, "content_sha256", **only("content_sha256 IS NOT NULL")),
)
table(
    "runs",
    identity(),
    given(WORD, "stage"),
    refers("recipe_id", "recipes"),
    refers("parent_id", "runs", nullable=True, index=True),
    refers("split_id", "splits", nullable=True, index=True),
    given(WORD, "status", "origin"),
    maybe(INT, "seed"),
    given(TEXT, "command"),
    maybe(TEXT, "query"),
    given(NAME, "code_version"),
    given(JSON, "environment"),
    given(NAME, "host", "user_name"),
    maybe(NAME, "process"),
    given(MOMENT, "started_at"),
    maybe(MOMENT, "ended_at"),
    maybe(JSON, "result"),
    maybe(TEXT, "error"),
    given(BIG_ID, "changed_rows", server_default="0"),
    sa.Index(None, "stage", "recipe_id"),
)
table(
    "split_groups",
    refers("split_id", "splits", primary_key=True),
    given(BIG_ID, "group_id", primary_key=True, autoincrement=False),
    given(WORD, "subset"),
)
table(
    "events",
    identity(),
    given(MOMENT, "created_at"),
    given(NAME, "user_name", "host"),
    maybe(NAME, "role"),
    given(TEXT, "command"),
    refers("run_id", "runs", nullable=True, index=True),
    maybe(TEXT, "reason", "file"),
    maybe(BIG_ID, "line"),
    given(NAME, "table_name"),
    maybe(BIG_ID, "row_id"),
    maybe(JSON, "old", "new"),
    maybe(SHA256, "previous_sha256"),
    given(SHA256, "sha256"),
    sa.Index(None, "table_name", "row_id"),
)
table(
    "feature_files",
    refers("feature_set_id", "feature_sets", primary_key=True),
    refers("artifact_id", "artifacts", primary_key=True, index=True),
    refers("run_id", "runs", index=True),
    given(INT, "n_rows"),
    given(BIG_ID, "first_cell_id", "last_cell_id"),
)
table(
    "image_files",
    identity(),
    refers("image_id", "images"),
    given(NAME, "channel"),
    given(INT, "position"),
    given(NAME, "name", index=True),
    refers("folder_id", "folders", nullable=True),
    maybe(SHA256, "sha256"),
    maybe(BIG_ID, "size_bytes", "modified_ns"),
    maybe(INT, "height", "width"),
    maybe(NAME, "dtype"),
    sa.UniqueConstraint("image_id", "channel"),
    sa.Index(None, "sha256", **only("sha256 IS NOT NULL")),
)
table(
    "image_flags",
    refers("run_id", "runs", primary_key=True),
    refers("image_id", "images", primary_key=True, index=True),
    given(WORD, "reason", primary_key=True),
    given(NAME, "channel", primary_key=True),
    given(FLOAT, "value"),
    maybe(FLOAT, "low", "high"),
)
table(
    "image_predictions",
    refers("run_id", "runs", primary_key=True),
    refers("image_id", "images", primary_key=True, index=True),
    given(INT, "rank", primary_key=True, autoincrement=False),
    refers("label_id", "labels"),
    given(FLOAT, "probability"),
    sa.CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
    sa.CheckConstraint("rank >= 1", name="rank"),
)
table(
    "image_quality",
    refers("image_id", "images", primary_key=True),
    refers("recipe_id", "recipes", primary_key=True),
    given(SHA256, "content_sha256", primary_key=True),
    given(NAME, "channel", primary_key=True),
    refers("run_id", "runs", index=True),
    maybe(FLOAT, "power_log_log_slope", "sharpness"),
    given(FLOAT, "saturated", "maximal", "background", "median", "mean", "std"),
)
table(
    "ingest_files",
    identity(),
    refers("run_id", "runs", index=True),
    given(TEXT, "name", index=True),
    given(SHA256, "sha256", index=True),
    given(BIG_ID, "size_bytes"),
    given(NAME, "layout"),
    given(BIG_ID, "n_rows", "n_created", "n_updated", "n_unchanged", "n_refused"),
)
table(
    "ingest_issues",
    identity(),
    refers("run_id", "runs", index=True),
    given(WORD, "severity"),
    given(TEXT, "file"),
    maybe(BIG_ID, "line"),
    given(NAME, "reason"),
    given(TEXT, "detail"),
)
table(
    "jobs",
    identity(),
    refers("recipe_id", "recipes"),
    refers("image_id", "images", index=True),
    given(SHA256, "content_sha256"),
    refers("run_id", "runs", index=True),
    given(WORD, "status"),
    given(INT, "attempts", "deaths"),
    maybe(NAME, "worker"),
    maybe(MOMENT, "lease_until", "not_before"),
    maybe(FLOAT, "seconds"),
    maybe(SHA256, "digest"),
    maybe(TEXT, "error"),
    sa.UniqueConstraint("recipe_id", "image_id", "content_sha256"),
    sa.Index(None, "recipe_id", "status", "id"),
)
table(
    "run_artifacts",
    refers("run_id", "runs", primary_key=True),
    refers("artifact_id", "artifacts", primary_key=True, index=True),
)
table(
    "run_metrics",
    refers("run_id", "runs", primary_key=True),
    given(INT, "epoch", primary_key=True, autoincrement=False),
    given(NAME, "name", primary_key=True),
    maybe(FLOAT, "value"),
)
table(
    "segmentations",
    identity(),
    refers("image_id", "images"),
    refers("recipe_id", "recipes", index=True),
    maybe(SHA256, "content_sha256"),
    refers("run_id", "runs", index=True),
    given(INT, "n_cells"),
    maybe(FLOAT, "diameter"),
    refers("mask_artifact_id", "artifacts", nullable=True, index=True),
    refers("flow_artifact_id", "artifacts", nullable=True, index=True),
    given(MOMENT, "created_at"),
    sa.UniqueConstraint("image_id", "recipe_id", "content_sha256"),
    sa.Index(
        "uq_segmentations_of_unknown_bytes",
        "image_id",
        "recipe_id",
        unique=True,
        **only("content_sha256 IS NULL"),
    ),
)
table(
    "split_members",
    refers("split_id", "splits", primary_key=True),
    refers("image_id", "images", primary_key=True, index=True),
    given(WORD, "subset"),
    refers("label_id", "labels"),
)
table(
    "cells",
    identity(),
    refers("segmentation_id", "segmentations"),
    given(INT, "object_number"),
    maybe(INT, "min_row", "min_col", "max_row", "max_col"),
    maybe(FLOAT, "centroid_row", "centroid_col"),
    maybe(NAME, "excluded"),
    sa.UniqueConstraint("segmentation_id", "object_number"),
    sa.Index(None, "id", "excluded", **only("excluded IS NOT NULL")),
)
table(
    "cell_flags",
    refers("run_id", "runs", primary_key=True),
    refers("cell_id", "cells", primary_key=True, index=True),
    given(WORD, "reason", primary_key=True),
    maybe(FLOAT, "value"),
)
table(
    "features",
    refers("cell_id", "cells", primary_key=True),
    refers("recipe_id", "recipes", primary_key=True),
    refers("run_id", "runs", index=True),
    maybe(
        FLOAT,
        "area",
        "convex_area",
        "perimeter",
        "eccentricity",
        "mean_intensity",
        "min_intensity",
        "max_intensity",
        "major_axis_length",
        "minor_axis_length",
        "orientation",
        "solidity",
        "extent",
    ),
)
table(
    "predictions",
    refers("run_id", "runs", primary_key=True),
    refers("cell_id", "cells", primary_key=True, index=True),
    given(INT, "rank", primary_key=True, autoincrement=False),
    refers("label_id", "labels"),
    given(FLOAT, "probability"),
    sa.CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
    sa.CheckConstraint("rank >= 1", name="rank"),
)
table(
    "treatment_scores",
    identity(),
    refers("run_id", "runs", index=True),
    given(WORD, "level"),
    given(TEXT, "name"),
    refers("treatment_id", "treatments", nullable=True, index=True),
    maybe(FLOAT, "dose"),
    maybe(NAME, "dose_unit", "cell_line", "time_point"),
    given(NAME, "plate_set", "measure"),
    maybe(NAME, "quantity"),
    maybe(FLOAT, "value", "low", "high", "p", "q"),
    given(INT, "n_wells", "n_controls", "n_plates"),
    maybe(WORD, "verdict"),
    maybe(TEXT, "note"),
)


# What was once said stays, whoever holds the connection.
APPEND_ONLY = (*("predictions", "image_predictions", "treatment_scores", "annotations", "events"),)

# A run that has ended is closed: no such row comes to it any more.
OF_RUN = (
    *("predictions", "image_predictions", "run_metrics", "run_artifacts", "segmentations"),
    *("features", "feature_files", "image_quality", "image_flags", "cell_flags"),
    *("ingest_files", "ingest_issues", "treatment_scores"),
)
CLOSED = "run has ended"
KEPT = "run stays as it began"
REOPENED = "run is opened again by an event only"
NEVER_DELETED = "run is never deleted"
NEVER_EMPTIED = "table is never emptied"
OF_RUN_ID = "SELECT ended_at FROM runs WHERE id = NEW.run_id"
OF_SEGMENTATION = """SELECT r.ended_at FROM segmentations s JOIN runs r ON r.id = s.run_id
    WHERE s.id = NEW.segmentation_id"""
BEGINNING = (
    *("id", "stage", "recipe_id", "parent_id", "origin", "seed", "command", "query"),
    *("code_version", "host", "user_name", "started_at"),
)
# The event that opens a run again comes first, and is the last one about the run.
IS_OPENED = """EXISTS (SELECT 1 FROM events e WHERE e.id = (
    SELECT max(id) FROM events WHERE table_name = 'runs' AND row_id = OLD.id)
    AND {status} = 'running')"""

# Of these, a run counts what is changed or deleted after it wrote it: so copies know that they are
# out of date. With the run of a row.
_OF_SEGMENTATION = "(SELECT run_id FROM segmentations WHERE id = {row}.segmentation_id)"
COUNTED = {
    **dict.fromkeys(("predictions", "features", "image_quality", "cell_flags"), "{row}.run_id"),
    "segmentations": "{row}.run_id",
    "cells": _OF_SEGMENTATION,
}

FROZEN = "split is frozen"
TOGETHER = "split keeps each group in one subset"
NO_GROUP = "split member is in no group"
FIXED = "split keeps its protocol and group level"
TAKEN = "split is there already"
MEANT = "split says what it is about"

GROUPED = "('well', 'plate', 'perturbation')"
GROUP_OF = """
    SELECT CASE s.group_level WHEN 'well' THEN i.well_id WHEN 'plate' THEN w.plate_id
        ELSE t.perturbations_key END
    FROM splits s CROSS JOIN images i JOIN wells w ON w.id = i.well_id
    LEFT JOIN treatments t ON t.id = w.treatment_id
    WHERE s.id = NEW.split_id AND i.id = NEW.image_id
"""


def frozen(split_id: str) -> str:
    return f"EXISTS (SELECT 1 FROM splits WHERE id = {split_id} AND frozen_at IS NOT NULL)"


def refuse_where(condition: str, reason: str) -> str:
    return f"SELECT RAISE(ABORT, '{reason}') WHERE {condition};"


KEEP_TOGETHER = f"""
    {refuse_where(f"({GROUP_OF}) IS NULL", NO_GROUP)}
    {
    refuse_where(
        "EXISTS (SELECT 1 FROM split_groups WHERE split_id = NEW.split_id "
        f"AND group_id = ({GROUP_OF}) AND subset <> NEW.subset)",
        TOGETHER,
    )
}
    INSERT INTO split_groups (split_id, group_id, subset)
    SELECT NEW.split_id, ({GROUP_OF}), NEW.subset WHERE NOT EXISTS (
        SELECT 1 FROM split_groups WHERE split_id = NEW.split_id AND group_id = ({GROUP_OF}));
"""
IS_GROUPED = f"(SELECT group_level FROM splits WHERE id = NEW.split_id) IN {GROUPED}"
# What a split is about: where its images were, what its classes were called, who relied on it.
IMAGE_MOVES = "EXISTS (SELECT 1 FROM split_members WHERE image_id = OLD.id)"
WELL_MOVES = """EXISTS (SELECT 1 FROM images i JOIN split_members m ON m.image_id = i.id
    WHERE i.well_id = OLD.id)"""
CLASS_CHANGES = "EXISTS (SELECT 1 FROM split_members WHERE label_id = OLD.id)"
FREEZE = """
    UPDATE splits SET frozen_at = NEW.started_at WHERE id = NEW.split_id AND frozen_at IS NULL;
"""

# Name: when, and what. No DELETE trigger hears of what INSERT OR REPLACE takes away, so INSERT
# triggers see to it: a new split that already has members or runs was there before.
SQLITE = {
    "split_members_frozen_insert": (
        "AFTER INSERT ON split_members",
        refuse_where(frozen("NEW.split_id"), FROZEN),
    ),
    "split_members_frozen_update": (
        "BEFORE UPDATE ON split_members",
        refuse_where(f"{frozen('OLD.split_id')} OR {frozen('NEW.split_id')}", FROZEN),
    ),
    "split_members_frozen_delete": (
        "BEFORE DELETE ON split_members",
        refuse_where(frozen("OLD.split_id"), FROZEN),
    ),
    "split_members_together_insert": (
        f"AFTER INSERT ON split_members WHEN {IS_GROUPED}",
        KEEP_TOGETHER,
    ),
    "split_members_together_update": (
        f"AFTER UPDATE OF split_id, image_id, subset ON split_members WHEN {IS_GROUPED}",
        KEEP_TOGETHER,
    ),
    "split_groups_together_insert": (
        "BEFORE INSERT ON split_groups",
        refuse_where(
            "EXISTS (SELECT 1 FROM split_groups WHERE split_id = NEW.split_id "
            "AND group_id = NEW.group_id AND subset <> NEW.subset)",
            TOGETHER,
        ),
    ),
    "split_groups_together_update": (
        "BEFORE UPDATE ON split_groups",
        refuse_where("1", TOGETHER),
    ),
    "split_groups_together_delete": (
        "BEFORE DELETE ON split_groups",
        refuse_where(
            "EXISTS (SELECT 1 FROM split_members WHERE split_id = OLD.split_id)", TOGETHER
        ),
    ),
    "splits_taken_insert": (
        "AFTER INSERT ON splits",
        refuse_where(
            "EXISTS (SELECT 1 FROM split_members WHERE split_id = NEW.id) "
            "OR EXISTS (SELECT 1 FROM runs WHERE split_id = NEW.id)",
            TAKEN,
        ),
    ),
    "splits_frozen_update": (
        "BEFORE UPDATE ON splits WHEN OLD.frozen_at IS NOT NULL",
        refuse_where("1", FROZEN),
    ),
    "splits_fixed_update": (
        "BEFORE UPDATE OF id, protocol, group_level ON splits",
        refuse_where(
            "OLD.id <> NEW.id OR OLD.protocol <> NEW.protocol "
            "OR OLD.group_level <> NEW.group_level",
            FIXED,
        ),
    ),
    "splits_frozen_delete": (
        "BEFORE DELETE ON splits WHEN OLD.frozen_at IS NOT NULL",
        refuse_where("1", FROZEN),
    ),
    "images_stay_update": (
        "BEFORE UPDATE OF well_id ON images WHEN OLD.well_id <> NEW.well_id",
        refuse_where(IMAGE_MOVES, MEANT),
    ),
    "wells_stay_update": (
        "BEFORE UPDATE OF plate_id ON wells WHEN OLD.plate_id <> NEW.plate_id",
        refuse_where(WELL_MOVES, MEANT),
    ),
    "labels_stay_update": (
        "BEFORE UPDATE OF field, value ON labels",
        refuse_where(CLASS_CHANGES, MEANT),
    ),
    "runs_stay_update": (
        "BEFORE UPDATE OF split_id ON runs WHEN OLD.split_id IS NOT NULL",
        refuse_where("NEW.split_id IS NOT OLD.split_id", MEANT),
    ),
    "runs_begun_update": (
        f"BEFORE UPDATE OF {', '.join(BEGINNING)} ON runs",
        refuse_where(" OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name in BEGINNING), KEPT),
    ),
    "runs_opened_update": (
        "BEFORE UPDATE OF ended_at ON runs WHEN OLD.ended_at IS NOT NULL AND NEW.ended_at IS NULL",
        refuse_where("NOT " + IS_OPENED.format(status="json_extract(e.new, '$.status')"), REOPENED),
    ),
    "runs_kept_delete": ("BEFORE DELETE ON runs", refuse_where("1", NEVER_DELETED)),
    "cells_closed": (
        f"AFTER INSERT ON cells WHEN ({OF_SEGMENTATION}) IS NOT NULL",
        refuse_where("1", CLOSED),
    ),
    **{
        f"{table}_closed": (
            f"AFTER INSERT ON {table} WHEN ({OF_RUN_ID}) IS NOT NULL",
            refuse_where("1", CLOSED),
        )
        for table in OF_RUN
    },
    "runs_freeze_insert": ("AFTER INSERT ON runs WHEN NEW.split_id IS NOT NULL", FREEZE),
    "runs_freeze_update": (
        "AFTER UPDATE OF split_id ON runs WHEN NEW.split_id IS NOT NULL",
        FREEZE,
    ),
}


def raising(reason: str) -> str:
    return f"RAISE EXCEPTION '{reason}' USING ERRCODE = 'integrity_constraint_violation';"


# FOR SHARE: who freezes the split waits for who is adding to it, and the other way round.
# ON CONFLICT DO NOTHING waits for who says the subset of the same group at this moment.
POSTGRESQL = {
    "split_members_guard": (
        "AFTER INSERT OR UPDATE OR DELETE ON split_members FOR EACH ROW",
        f"""
DECLARE
    moment timestamptz;
    grouped boolean;
    member_group bigint;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        SELECT frozen_at INTO moment FROM splits WHERE id = OLD.split_id FOR SHARE;
        IF moment IS NOT NULL THEN {raising(FROZEN)} END IF;
    END IF;
    IF TG_OP = 'DELETE' THEN RETURN NULL; END IF;
    SELECT frozen_at, group_level IN {GROUPED} INTO moment, grouped
        FROM splits WHERE id = NEW.split_id FOR SHARE;
    IF moment IS NOT NULL THEN {raising(FROZEN)} END IF;
    IF NOT grouped THEN RETURN NULL; END IF;
    member_group := ({GROUP_OF});
    IF member_group IS NULL THEN {raising(NO_GROUP)} END IF;
    INSERT INTO split_groups (split_id, group_id, subset)
        VALUES (NEW.split_id, member_group, NEW.subset) ON CONFLICT DO NOTHING;
    PERFORM 1 FROM split_groups WHERE split_id = NEW.split_id AND group_id = member_group
        AND subset <> NEW.subset;
    IF FOUND THEN {raising(TOGETHER)} END IF;
    RETURN NULL;
END""",
    ),
    "split_groups_guard": (
        "BEFORE UPDATE OR DELETE ON split_groups FOR EACH ROW",
        f"""
BEGIN
    IF TG_OP = 'DELETE' THEN
        PERFORM 1 FROM split_members WHERE split_id = OLD.split_id LIMIT 1;
        IF NOT FOUND THEN RETURN OLD; END IF;
    END IF;
    {raising(TOGETHER)}
END""",
    ),
    "splits_guard": (
        "BEFORE UPDATE OR DELETE ON splits FOR EACH ROW",
        f"""
BEGIN
    IF OLD.frozen_at IS NOT NULL THEN {raising(FROZEN)} END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF (OLD.id, OLD.protocol, OLD.group_level) <> (NEW.id, NEW.protocol, NEW.group_level) THEN
        {raising(FIXED)}
    END IF;
    RETURN NEW;
END""",
    ),
    "images_stay": (
        "BEFORE UPDATE OF well_id ON images FOR EACH ROW WHEN (OLD.well_id <> NEW.well_id)",
        f"BEGIN IF {IMAGE_MOVES} THEN {raising(MEANT)} END IF; RETURN NEW; END",
    ),
    "wells_stay": (
        "BEFORE UPDATE OF plate_id ON wells FOR EACH ROW WHEN (OLD.plate_id <> NEW.plate_id)",
        f"BEGIN IF {WELL_MOVES} THEN {raising(MEANT)} END IF; RETURN NEW; END",
    ),
    "labels_stay": (
        "BEFORE UPDATE OF field, value ON labels FOR EACH ROW",
        f"BEGIN IF {CLASS_CHANGES} THEN {raising(MEANT)} END IF; RETURN NEW; END",
    ),
    "runs_stay": (
        "BEFORE UPDATE OF split_id ON runs FOR EACH ROW WHEN (OLD.split_id IS NOT NULL)",
        f"""
BEGIN
    IF NEW.split_id IS DISTINCT FROM OLD.split_id THEN {raising(MEANT)} END IF;
    RETURN NEW;
END""",
    ),
    "runs_begun": (
        f"BEFORE DELETE OR UPDATE OF {', '.join(BEGINNING)} ON runs FOR EACH ROW",
        f"""
BEGIN
    IF TG_OP = 'DELETE' THEN {raising(NEVER_DELETED)} END IF;
    IF ({", ".join(f"OLD.{name}" for name in BEGINNING)})
        IS DISTINCT FROM ({", ".join(f"NEW.{name}" for name in BEGINNING)}) THEN
        {raising(KEPT)}
    END IF;
    RETURN NEW;
END""",
    ),
    "runs_opened": (
        """BEFORE UPDATE OF ended_at ON runs FOR EACH ROW
WHEN (OLD.ended_at IS NOT NULL AND NEW.ended_at IS NULL)""",
        f"""
BEGIN
    IF NOT {IS_OPENED.format(status="e.new ->> 'status'")} THEN {raising(REOPENED)} END IF;
    RETURN NEW;
END""",
    ),
    "runs_freeze": (
        "AFTER INSERT OR UPDATE OF split_id ON runs FOR EACH ROW WHEN (NEW.split_id IS NOT NULL)",
        f"BEGIN {FREEZE} RETURN NULL; END",
    ),
}
# Once for each statement, however many rows it brings. FOR SHARE: who ends the run waits for who
# is adding to it.
ENDED = f"""
BEGIN
    PERFORM 1 FROM (SELECT ended_at FROM runs WHERE id IN ({{ids}}) FOR SHARE) r
        WHERE ended_at IS NOT NULL;
    IF FOUND THEN {raising(CLOSED)} END IF;
    RETURN NULL;
END"""
RUN_IDS = {
    "runs_closed": "SELECT run_id FROM added",
    "cells_closed": "SELECT s.run_id FROM added JOIN segmentations s ON s.id = segmentation_id",
}
# Once for each statement, however many rows it changes.
COUNTING = """
BEGIN
    UPDATE runs SET changed_rows = changed_rows + g.number
    FROM (SELECT {run} AS run_id, count(*) AS number FROM changed AS r GROUP BY 1) AS g
    WHERE runs.id = g.run_id;
    RETURN NULL;
END"""
EMPTIED = ("splits", "split_members", "split_groups")
EMPTIED_BODY = f"""
BEGIN
    PERFORM 1 FROM splits WHERE frozen_at IS NOT NULL LIMIT 1;
    IF FOUND THEN {raising(FROZEN)} END IF;
    RETURN NULL;
END"""


# Every column has the same type in each part: only then SQLite looks rows up in the parts instead
# of reading them all.
EXCLUSIONS = """
CREATE VIEW exclusions AS
SELECT CAST('cell' AS VARCHAR(20)) AS level, id, CAST(excluded AS TEXT) AS reason,
    CAST('segmentation' AS VARCHAR(20)) AS source, CAST(NULL AS BIGINT) AS run_id,
    CAST(NULL AS BIGINT) AS annotation_id
FROM cells WHERE excluded IS NOT NULL
UNION ALL
SELECT CAST('image' AS VARCHAR(20)), image_id, CAST(reason AS TEXT),
    CAST('quality' AS VARCHAR(20)), run_id, CAST(NULL AS BIGINT)
FROM image_flags
UNION ALL
SELECT CAST('cell' AS VARCHAR(20)), cell_id, CAST(reason AS TEXT),
    CAST('quality' AS VARCHAR(20)), run_id, CAST(NULL AS BIGINT)
FROM cell_flags
UNION ALL
SELECT level, row_id, CAST(coalesce(reason, 'excluded by ' || user_name) AS TEXT),
    CAST('annotation' AS VARCHAR(20)), CAST(NULL AS BIGINT), id
FROM annotations AS a
WHERE kind = 'exclusion' AND undoes_id IS NULL
    AND NOT EXISTS (SELECT 1 FROM annotations AS later WHERE later.undoes_id = a.id)
"""


def functions(dialect: str) -> dict[str, str]:
    """Return by name the body of each function that a trigger runs; SQLite has none."""
    if dialect == "sqlite":
        return {}
    return {
        **{f"{t}_keep": f"BEGIN RAISE EXCEPTION '{t} are append-only'; END" for t in APPEND_ONLY},
        **{name: body for name, (_, body) in POSTGRESQL.items()},
        **{name: ENDED.format(ids=ids) for name, ids in RUN_IDS.items()},
        **{
            f"{table}_counted": COUNTING.format(run=run.format(row="r"))
            for table, run in COUNTED.items()
        },
        "splits_emptied": EMPTIED_BODY,
        "rows_emptied": f"BEGIN {raising(NEVER_EMPTIED)} END",
    }


def triggers(dialect: str) -> dict[str, str]:
    """Return by name the statement that makes each trigger."""
    found = {}
    if dialect == "sqlite":
        for table in APPEND_ONLY:
            for verb in ("UPDATE", "DELETE"):
                found[f"{table}_keep_{verb}"] = (
                    f"BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
                )
        for name, (when, body) in SQLITE.items():
            found[name] = f"{when} BEGIN {body} END"
        for table, run in COUNTED.items():
            # What is known of a segmentation is no column of a copy, but for its image.
            columns = " OF image_id, run_id" if table == "segmentations" else ""
            old, new = (run.format(row=row) for row in ("OLD", "NEW"))
            for what, ids in ((f"UPDATE{columns}", f"{old}, {new}"), ("DELETE", old)):
                found[f"{table}_counted_{what[:6]}"] = (
                    f"AFTER {what} ON {table} BEGIN "
                    f"UPDATE runs SET changed_rows = changed_rows + 1 WHERE id IN ({ids}); END"
                )
        return {name: f"CREATE TRIGGER {name} {rest}" for name, rest in found.items()}
    each = "FOR EACH STATEMENT EXECUTE FUNCTION"
    for table in APPEND_ONLY:
        found[f"{table}_keep"] = (
            f"BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} {each} {table}_keep()"
        )
    for name, (when, _) in POSTGRESQL.items():
        found[name] = f"{when} EXECUTE FUNCTION {name}()"
    for name in RUN_IDS:
        for table in OF_RUN if name == "runs_closed" else ("cells",):
            found[f"{table}_closed"] = (
                f"AFTER INSERT ON {table} REFERENCING NEW TABLE AS added {each} {name}()"
            )
    for table in COUNTED:
        for name, what, rows in (
            ("deleted", "DELETE", "OLD"),
            ("before", "UPDATE", "OLD"),
            ("after", "UPDATE", "NEW"),
        ):
            found[f"{table}_counted_{name}"] = (
                f"AFTER {what} ON {table} REFERENCING {rows} "
                f"TABLE AS changed {each} {table}_counted()"
            )
    # No other trigger sees what TRUNCATE takes away.
    for table in EMPTIED:
        found[f"{table}_emptied"] = f"BEFORE TRUNCATE ON {table} {each} splits_emptied()"
    for table in sorted({"runs", "jobs", "cells", *OF_RUN} - set(APPEND_ONLY)):
        found[f"{table}_emptied"] = f"BEFORE TRUNCATE ON {table} {each} rows_emptied()"
    return {name: f"CREATE TRIGGER {name} {rest}" for name, rest in found.items()}


def guard() -> None:
    dialect = op.get_bind().dialect.name
    for name, body in functions(dialect).items():
        op.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
    for statement in triggers(dialect).values():
        op.execute(statement)


def unguard() -> None:
    """Drop the triggers, as far as they are there."""
    dialect = op.get_bind().dialect.name
    for name in functions(dialect):
        op.execute(f"DROP FUNCTION IF EXISTS {name}() CASCADE")
    if dialect == "sqlite":
        for name in triggers(dialect):
            op.execute(f"DROP TRIGGER IF EXISTS {name}")


def upgrade() -> None:
    SCHEMA.create_all(op.get_bind(), checkfirst=False)
    op.execute(EXCLUSIONS)
    guard()


def downgrade() -> None:
    unguard()
    op.execute("DROP VIEW exclusions")
    SCHEMA.drop_all(op.get_bind(), checkfirst=False)
