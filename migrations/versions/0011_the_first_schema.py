"""The first schema

Revision: 0011
Follows:

Triggers keep what was said as it was said, and splits as they were drawn. On SQLite, whoever
makes a table anew (``batch_alter_table``) loses its triggers and has to make them again.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = None
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
FLOAT = sa.Float(precision=53)
MOMENT = sa.DateTime(timezone=True)
NAME = sa.String(length=255)
SHA256 = sa.String(length=64)
WORD = sa.String(length=20)


def refers(table: str, column: str, other: str, *, nullable: bool = False) -> sa.Column[int]:
    key = sa.ForeignKey(f"{other}.id", name=f"fk_{table}_{column}_{other}")
    return sa.Column(column, BIG_ID, key, nullable=nullable)


def only(condition: str) -> dict[str, Any]:
    """Make an index one of those rows alone that meet ``condition``."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


# What was once said stays, whoever holds the connection.
APPEND_ONLY = ("predictions", "image_predictions", "annotations", "events")

# A run that has ended is closed: no such row comes to it any more.
OF_RUN = (
    *("predictions", "image_predictions", "run_metrics", "run_artifacts", "segmentations"),
    *("features", "feature_files", "image_quality", "image_flags", "cell_flags"),
    *("ingest_files", "ingest_issues"),
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
    op.create_table(
        "annotations",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("level", WORD, nullable=False),
        sa.Column("row_id", BIG_ID, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("field", NAME),
        sa.Column("value", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("user_name", NAME, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        refers("annotations", "undoes_id", "annotations", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_annotations"),
    )
    op.create_index("ix_annotations_level_annotations_row_id", "annotations", ["level", "row_id"])
    op.create_index("ix_annotations_undoes_id", "annotations", ["undoes_id"])
    op.create_table(
        "artifacts",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", SHA256, nullable=False),
        sa.Column("size_bytes", BIG_ID, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("path", name="uq_artifacts_path"),
        sa.UniqueConstraint("sha256", "kind", name="uq_artifacts_sha256_kind"),
    )
    op.create_table(
        "folders",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_folders"),
        sa.UniqueConstraint("uri", name="uq_folders_uri"),
    )
    op.create_table(
        "labels",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("field", NAME, nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint("field", "value", name="uq_labels_field_value"),
    )
    op.create_table(
        "perturbations",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("identifier", NAME),
        sa.Column("target", sa.Text()),
        sa.Column("inchikey", NAME),
        sa.Column("smiles", sa.Text()),
        sa.Column("pubchem_cid", NAME),
        sa.PrimaryKeyConstraint("id", name="pk_perturbations"),
        sa.UniqueConstraint(
            "kind", "name", "identifier", name="uq_perturbations_kind_name_identifier"
        ),
    )
    op.create_index("ix_perturbations_identifier", "perturbations", ["identifier"])
    op.create_index("ix_perturbations_name", "perturbations", ["name"])
    op.create_index(
        "uq_perturbations_without_identifier",
        "perturbations",
        ["kind", "name"],
        unique=True,
        **only("identifier IS NULL"),
    )
    op.create_table(
        "plates",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("barcode", NAME, nullable=False),
        sa.Column("batch", NAME),
        sa.Column("cell_line", NAME),
        sa.Column("time_point", NAME),
        sa.Column("metadata", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_plates"),
        sa.UniqueConstraint("barcode", name="uq_plates_barcode"),
    )
    op.create_table(
        "recipes",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("stage", WORD, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("weights_sha256", SHA256),
        sa.Column("fingerprint", SHA256, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recipes"),
        sa.UniqueConstraint("stage", "fingerprint", name="uq_recipes_stage_fingerprint"),
    )
    op.create_table(
        "treatments",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("name_with_dose", sa.Text(), nullable=False),
        sa.Column("target", sa.Text()),
        sa.Column("perturbations_key", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_treatments"),
        sa.UniqueConstraint("identity", name="uq_treatments_identity"),
    )
    op.create_index("ix_treatments_name", "treatments", ["name"])
    op.create_table(
        "feature_sets",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        refers("feature_sets", "recipe_id", "recipes"),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.Column("storage", WORD, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feature_sets"),
        sa.UniqueConstraint("name", name="uq_feature_sets_name"),
        sa.UniqueConstraint("recipe_id", name="uq_feature_sets_recipe_id"),
    )
    op.create_table(
        "recipe_inputs",
        refers("recipe_inputs", "recipe_id", "recipes"),
        refers("recipe_inputs", "input_id", "recipes"),
        sa.PrimaryKeyConstraint("recipe_id", "input_id", name="pk_recipe_inputs"),
    )
    op.create_index("ix_recipe_inputs_input_id", "recipe_inputs", ["input_id"])
    op.create_table(
        "splits",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        refers("splits", "recipe_id", "recipes"),
        sa.Column("protocol", NAME, nullable=False),
        sa.Column("field", NAME, nullable=False),
        sa.Column("group_level", WORD, nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("fingerprint", SHA256, nullable=False),
        sa.Column("excluded", sa.JSON(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("frozen_at", MOMENT),
        sa.Column("family", NAME),
        sa.Column("fold", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name="pk_splits"),
        sa.UniqueConstraint("name", name="uq_splits_name"),
    )
    op.create_table(
        "treatment_parts",
        refers("treatment_parts", "treatment_id", "treatments"),
        sa.Column("position", sa.Integer(), nullable=False, autoincrement=False),
        refers("treatment_parts", "perturbation_id", "perturbations"),
        sa.Column("dose", FLOAT),
        sa.Column("dose_unit", NAME),
        sa.Column("dose_original", NAME),
        sa.PrimaryKeyConstraint("treatment_id", "position", name="pk_treatment_parts"),
    )
    op.create_index("ix_treatment_parts_perturbation_id", "treatment_parts", ["perturbation_id"])
    op.create_table(
        "wells",
        sa.Column("id", BIG_ID, nullable=False),
        refers("wells", "plate_id", "plates"),
        sa.Column("well_row", sa.Integer(), nullable=False),
        sa.Column("well_column", sa.Integer(), nullable=False),
        sa.Column("name", NAME, nullable=False),
        refers("wells", "treatment_id", "treatments", nullable=True),
        sa.Column("control", WORD),
        sa.Column("metadata", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_wells"),
        sa.UniqueConstraint(
            "plate_id", "well_row", "well_column", name="uq_wells_plate_id_well_row_well_column"
        ),
    )
    op.create_index("ix_wells_treatment_id", "wells", ["treatment_id"])
    op.create_table(
        "images",
        sa.Column("id", BIG_ID, nullable=False),
        refers("images", "well_id", "wells"),
        sa.Column("site", sa.Integer(), nullable=False),
        sa.Column("plane", sa.Integer(), nullable=False),
        sa.Column("time_point", sa.Integer(), nullable=False),
        sa.Column("core_name", NAME, nullable=False),
        sa.Column("content_sha256", SHA256),
        sa.Column("pixel_size", FLOAT),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
        sa.UniqueConstraint(
            "well_id", "site", "plane", "time_point", name="uq_images_well_id_site_plane_time_point"
        ),
    )
    op.create_index(
        "ix_images_content_sha256",
        "images",
        ["content_sha256"],
        **only("content_sha256 IS NOT NULL"),
    )
    op.create_index("ix_images_core_name", "images", ["core_name"])
    op.create_table(
        "runs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("stage", WORD, nullable=False),
        refers("runs", "recipe_id", "recipes"),
        refers("runs", "parent_id", "runs", nullable=True),
        refers("runs", "split_id", "splits", nullable=True),
        sa.Column("status", WORD, nullable=False),
        sa.Column("origin", WORD, nullable=False),
        sa.Column("seed", sa.Integer()),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("query", sa.Text()),
        sa.Column("code_version", NAME, nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("host", NAME, nullable=False),
        sa.Column("user_name", NAME, nullable=False),
        sa.Column("process", NAME),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("ended_at", MOMENT),
        sa.Column("result", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.Column("changed_rows", BIG_ID, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_parent_id", "runs", ["parent_id"])
    op.create_index("ix_runs_split_id", "runs", ["split_id"])
    op.create_index("ix_runs_stage_runs_recipe_id", "runs", ["stage", "recipe_id"])
    op.create_table(
        "split_groups",
        refers("split_groups", "split_id", "splits"),
        sa.Column("group_id", BIG_ID, nullable=False, autoincrement=False),
        sa.Column("subset", WORD, nullable=False),
        sa.PrimaryKeyConstraint("split_id", "group_id", name="pk_split_groups"),
    )
    op.create_table(
        "events",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("user_name", NAME, nullable=False),
        sa.Column("host", NAME, nullable=False),
        sa.Column("role", NAME),
        sa.Column("command", sa.Text(), nullable=False),
        refers("events", "run_id", "runs", nullable=True),
        sa.Column("reason", sa.Text()),
        sa.Column("file", sa.Text()),
        sa.Column("line", BIG_ID),
        sa.Column("table_name", NAME, nullable=False),
        sa.Column("row_id", BIG_ID),
        sa.Column("old", sa.JSON()),
        sa.Column("new", sa.JSON()),
        sa.Column("previous_sha256", SHA256),
        sa.Column("sha256", SHA256, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_run_id", "events", ["run_id"])
    op.create_index("ix_events_table_name_events_row_id", "events", ["table_name", "row_id"])
    op.create_table(
        "feature_files",
        refers("feature_files", "feature_set_id", "feature_sets"),
        refers("feature_files", "artifact_id", "artifacts"),
        refers("feature_files", "run_id", "runs"),
        sa.Column("n_rows", sa.Integer(), nullable=False),
        sa.Column("first_cell_id", BIG_ID, nullable=False),
        sa.Column("last_cell_id", BIG_ID, nullable=False),
        sa.PrimaryKeyConstraint("feature_set_id", "artifact_id", name="pk_feature_files"),
    )
    op.create_index("ix_feature_files_artifact_id", "feature_files", ["artifact_id"])
    op.create_index("ix_feature_files_run_id", "feature_files", ["run_id"])
    op.create_table(
        "image_files",
        sa.Column("id", BIG_ID, nullable=False),
        refers("image_files", "image_id", "images"),
        sa.Column("channel", NAME, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", NAME, nullable=False),
        refers("image_files", "folder_id", "folders", nullable=True),
        sa.Column("sha256", SHA256),
        sa.Column("size_bytes", BIG_ID),
        sa.Column("modified_ns", BIG_ID),
        sa.Column("height", sa.Integer()),
        sa.Column("width", sa.Integer()),
        sa.Column("dtype", NAME),
        sa.PrimaryKeyConstraint("id", name="pk_image_files"),
        sa.UniqueConstraint("image_id", "channel", name="uq_image_files_image_id_channel"),
    )
    op.create_index("ix_image_files_name", "image_files", ["name"])
    op.create_index(
        "ix_image_files_sha256", "image_files", ["sha256"], **only("sha256 IS NOT NULL")
    )
    op.create_table(
        "image_flags",
        refers("image_flags", "run_id", "runs"),
        refers("image_flags", "image_id", "images"),
        sa.Column("reason", WORD, nullable=False),
        sa.Column("channel", NAME, nullable=False),
        sa.Column("value", FLOAT, nullable=False),
        sa.Column("low", FLOAT),
        sa.Column("high", FLOAT),
        sa.PrimaryKeyConstraint("run_id", "image_id", "reason", "channel", name="pk_image_flags"),
    )
    op.create_index("ix_image_flags_image_id", "image_flags", ["image_id"])
    op.create_table(
        "image_predictions",
        refers("image_predictions", "run_id", "runs"),
        refers("image_predictions", "image_id", "images"),
        sa.Column("rank", sa.Integer(), nullable=False, autoincrement=False),
        refers("image_predictions", "label_id", "labels"),
        sa.Column("probability", FLOAT, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "image_id", "rank", name="pk_image_predictions"),
        sa.CheckConstraint(
            "probability >= 0 AND probability <= 1", name=op.f("ck_image_predictions_probability")
        ),
        sa.CheckConstraint("rank >= 1", name=op.f("ck_image_predictions_rank")),
    )
    op.create_index("ix_image_predictions_image_id", "image_predictions", ["image_id"])
    op.create_table(
        "image_quality",
        refers("image_quality", "image_id", "images"),
        refers("image_quality", "recipe_id", "recipes"),
        sa.Column("content_sha256", SHA256, nullable=False),
        sa.Column("channel", NAME, nullable=False),
        refers("image_quality", "run_id", "runs"),
        sa.Column("power_log_log_slope", FLOAT),
        sa.Column("sharpness", FLOAT),
        sa.Column("saturated", FLOAT, nullable=False),
        sa.Column("maximal", FLOAT, nullable=False),
        sa.Column("background", FLOAT, nullable=False),
        sa.Column("median", FLOAT, nullable=False),
        sa.Column("mean", FLOAT, nullable=False),
        sa.Column("std", FLOAT, nullable=False),
        sa.PrimaryKeyConstraint(
            "image_id", "recipe_id", "content_sha256", "channel", name="pk_image_quality"
        ),
    )
    op.create_index("ix_image_quality_run_id", "image_quality", ["run_id"])
    op.create_table(
        "ingest_files",
        sa.Column("id", BIG_ID, nullable=False),
        refers("ingest_files", "run_id", "runs"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", SHA256, nullable=False),
        sa.Column("size_bytes", BIG_ID, nullable=False),
        sa.Column("layout", NAME, nullable=False),
        sa.Column("n_rows", BIG_ID, nullable=False),
        sa.Column("n_created", BIG_ID, nullable=False),
        sa.Column("n_updated", BIG_ID, nullable=False),
        sa.Column("n_unchanged", BIG_ID, nullable=False),
        sa.Column("n_refused", BIG_ID, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ingest_files"),
    )
    op.create_index("ix_ingest_files_name", "ingest_files", ["name"])
    op.create_index("ix_ingest_files_run_id", "ingest_files", ["run_id"])
    op.create_index("ix_ingest_files_sha256", "ingest_files", ["sha256"])
    op.create_table(
        "ingest_issues",
        sa.Column("id", BIG_ID, nullable=False),
        refers("ingest_issues", "run_id", "runs"),
        sa.Column("severity", WORD, nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("line", BIG_ID),
        sa.Column("reason", NAME, nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ingest_issues"),
    )
    op.create_index("ix_ingest_issues_run_id", "ingest_issues", ["run_id"])
    op.create_table(
        "jobs",
        sa.Column("id", BIG_ID, nullable=False),
        refers("jobs", "recipe_id", "recipes"),
        refers("jobs", "image_id", "images"),
        sa.Column("content_sha256", SHA256, nullable=False),
        refers("jobs", "run_id", "runs"),
        sa.Column("status", WORD, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("worker", NAME),
        sa.Column("lease_until", MOMENT),
        sa.Column("not_before", MOMENT),
        sa.Column("seconds", FLOAT),
        sa.Column("digest", SHA256),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint(
            "recipe_id",
            "image_id",
            "content_sha256",
            name="uq_jobs_recipe_id_image_id_content_sha256",
        ),
    )
    op.create_index("ix_jobs_image_id", "jobs", ["image_id"])
    op.create_index("ix_jobs_recipe_id_jobs_status_jobs_id", "jobs", ["recipe_id", "status", "id"])
    op.create_index("ix_jobs_run_id", "jobs", ["run_id"])
    op.create_table(
        "run_artifacts",
        refers("run_artifacts", "run_id", "runs"),
        refers("run_artifacts", "artifact_id", "artifacts"),
        sa.PrimaryKeyConstraint("run_id", "artifact_id", name="pk_run_artifacts"),
    )
    op.create_index("ix_run_artifacts_artifact_id", "run_artifacts", ["artifact_id"])
    op.create_table(
        "run_metrics",
        refers("run_metrics", "run_id", "runs"),
        sa.Column("epoch", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("value", FLOAT),
        sa.PrimaryKeyConstraint("run_id", "epoch", "name", name="pk_run_metrics"),
    )
    op.create_table(
        "segmentations",
        sa.Column("id", BIG_ID, nullable=False),
        refers("segmentations", "image_id", "images"),
        refers("segmentations", "recipe_id", "recipes"),
        sa.Column("content_sha256", SHA256),
        refers("segmentations", "run_id", "runs"),
        sa.Column("n_cells", sa.Integer(), nullable=False),
        sa.Column("diameter", FLOAT),
        refers("segmentations", "mask_artifact_id", "artifacts", nullable=True),
        refers("segmentations", "flow_artifact_id", "artifacts", nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_segmentations"),
        sa.UniqueConstraint(
            "image_id",
            "recipe_id",
            "content_sha256",
            name="uq_segmentations_image_id_recipe_id_content_sha256",
        ),
    )
    op.create_index("ix_segmentations_flow_artifact_id", "segmentations", ["flow_artifact_id"])
    op.create_index("ix_segmentations_mask_artifact_id", "segmentations", ["mask_artifact_id"])
    op.create_index("ix_segmentations_recipe_id", "segmentations", ["recipe_id"])
    op.create_index("ix_segmentations_run_id", "segmentations", ["run_id"])
    op.create_index(
        "uq_segmentations_of_unknown_bytes",
        "segmentations",
        ["image_id", "recipe_id"],
        unique=True,
        **only("content_sha256 IS NULL"),
    )
    op.create_table(
        "split_members",
        refers("split_members", "split_id", "splits"),
        refers("split_members", "image_id", "images"),
        sa.Column("subset", WORD, nullable=False),
        refers("split_members", "label_id", "labels"),
        sa.PrimaryKeyConstraint("split_id", "image_id", name="pk_split_members"),
    )
    op.create_index("ix_split_members_image_id", "split_members", ["image_id"])
    op.create_table(
        "cells",
        sa.Column("id", BIG_ID, nullable=False),
        refers("cells", "segmentation_id", "segmentations"),
        sa.Column("object_number", sa.Integer(), nullable=False),
        sa.Column("min_row", sa.Integer()),
        sa.Column("min_col", sa.Integer()),
        sa.Column("max_row", sa.Integer()),
        sa.Column("max_col", sa.Integer()),
        sa.Column("centroid_row", FLOAT),
        sa.Column("centroid_col", FLOAT),
        sa.Column("excluded", NAME),
        sa.PrimaryKeyConstraint("id", name="pk_cells"),
        sa.UniqueConstraint(
            "segmentation_id", "object_number", name="uq_cells_segmentation_id_object_number"
        ),
    )
    op.create_index(
        "ix_cells_id_cells_excluded", "cells", ["id", "excluded"], **only("excluded IS NOT NULL")
    )
    op.create_table(
        "cell_flags",
        refers("cell_flags", "run_id", "runs"),
        refers("cell_flags", "cell_id", "cells"),
        sa.Column("reason", WORD, nullable=False),
        sa.Column("value", FLOAT),
        sa.PrimaryKeyConstraint("run_id", "cell_id", "reason", name="pk_cell_flags"),
    )
    op.create_index("ix_cell_flags_cell_id", "cell_flags", ["cell_id"])
    op.create_table(
        "features",
        refers("features", "cell_id", "cells"),
        refers("features", "recipe_id", "recipes"),
        refers("features", "run_id", "runs"),
        sa.Column("area", FLOAT),
        sa.Column("convex_area", FLOAT),
        sa.Column("perimeter", FLOAT),
        sa.Column("eccentricity", FLOAT),
        sa.Column("mean_intensity", FLOAT),
        sa.Column("min_intensity", FLOAT),
        sa.Column("max_intensity", FLOAT),
        sa.Column("major_axis_length", FLOAT),
        sa.Column("minor_axis_length", FLOAT),
        sa.Column("orientation", FLOAT),
        sa.Column("solidity", FLOAT),
        sa.Column("extent", FLOAT),
        sa.PrimaryKeyConstraint("cell_id", "recipe_id", name="pk_features"),
    )
    op.create_index("ix_features_run_id", "features", ["run_id"])
    op.create_table(
        "predictions",
        refers("predictions", "run_id", "runs"),
        refers("predictions", "cell_id", "cells"),
        sa.Column("rank", sa.Integer(), nullable=False, autoincrement=False),
        refers("predictions", "label_id", "labels"),
        sa.Column("probability", FLOAT, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "cell_id", "rank", name="pk_predictions"),
        sa.CheckConstraint(
            "probability >= 0 AND probability <= 1", name=op.f("ck_predictions_probability")
        ),
        sa.CheckConstraint("rank >= 1", name=op.f("ck_predictions_rank")),
    )
    op.create_index("ix_predictions_cell_id", "predictions", ["cell_id"])
    op.execute(EXCLUSIONS)
    guard()


def downgrade() -> None:
    unguard()
    op.execute("DROP VIEW exclusions")
    for table in reversed(TABLES):
        op.drop_table(table)


TABLES = (
    "annotations",
    "artifacts",
    "folders",
    "labels",
    "perturbations",
    "plates",
    "recipes",
    "treatments",
    "feature_sets",
    "recipe_inputs",
    "splits",
    "treatment_parts",
    "wells",
    "images",
    "runs",
    "split_groups",
    "events",
    "feature_files",
    "image_files",
    "image_flags",
    "image_predictions",
    "image_quality",
    "ingest_files",
    "ingest_issues",
    "jobs",
    "run_artifacts",
    "run_metrics",
    "segmentations",
    "split_members",
    "cells",
    "cell_flags",
    "features",
    "predictions",
)
