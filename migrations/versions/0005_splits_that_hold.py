"""Splits that hold: groups on one side, frozen once a run relies on them, folds of a family

Revision: 0005
Follows: 0004

Triggers do the guarding. On SQLite, whoever makes ``splits``, ``split_members``, ``split_groups``,
``images``, ``wells``, ``labels`` or ``runs`` anew (``batch_alter_table``) loses theirs and has to
make them again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = sa.String(length=255)
SIDE = sa.String(length=20)

FROZEN = "split is frozen"
TOGETHER = "split keeps each group on one side"
NO_GROUP = "split member is in no group"
FIXED = "split keeps its protocol and group level"
TAKEN = "split is there already"
MEANT = "split says what it is about"

GROUPED = "('well', 'plate', 'treatment')"
GROUP_OF = """
    SELECT CASE s.group_level WHEN 'well' THEN i.well_id WHEN 'plate' THEN w.plate_id
        ELSE w.treatment_id END
    FROM splits s CROSS JOIN images i JOIN wells w ON w.id = i.well_id
    WHERE s.id = NEW.split_id AND i.id = NEW.image_id
"""
# A store of an earlier schema may hold a group on two sides, which nothing stopped then: its
# first side is taken, and `cellstore split check` finds the others.
GROUPS_SO_FAR = f"""
INSERT INTO split_groups (split_id, group_id, subset)
SELECT s.id, CASE s.group_level WHEN 'well' THEN i.well_id ELSE w.plate_id END, MIN(m.subset)
FROM splits s JOIN split_members m ON m.split_id = s.id
JOIN images i ON i.id = m.image_id JOIN wells w ON w.id = i.well_id
WHERE s.group_level IN {GROUPED}
GROUP BY s.id, CASE s.group_level WHEN 'well' THEN i.well_id ELSE w.plate_id END
"""
FREEZE_WHAT_RUNS_USE = """
UPDATE splits SET frozen_at = (SELECT MIN(started_at) FROM runs WHERE split_id = splits.id)
WHERE frozen_at IS NULL AND id IN (SELECT split_id FROM runs WHERE split_id IS NOT NULL)
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
    "runs_freeze_insert": ("AFTER INSERT ON runs WHEN NEW.split_id IS NOT NULL", FREEZE),
    "runs_freeze_update": (
        "AFTER UPDATE OF split_id ON runs WHEN NEW.split_id IS NOT NULL",
        FREEZE,
    ),
}


def raising(reason: str) -> str:
    return f"RAISE EXCEPTION '{reason}' USING ERRCODE = 'integrity_constraint_violation';"


# FOR SHARE: who freezes the split waits for who is adding to it, and the other way round.
# ON CONFLICT DO NOTHING waits for who says the side of the same group at this moment.
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
    "runs_freeze": (
        "AFTER INSERT OR UPDATE OF split_id ON runs FOR EACH ROW WHEN (NEW.split_id IS NOT NULL)",
        f"BEGIN {FREEZE} RETURN NULL; END",
    ),
}
EMPTIED = ("splits", "split_members", "split_groups")
EMPTIED_BODY = f"""
BEGIN
    PERFORM 1 FROM splits WHERE frozen_at IS NOT NULL LIMIT 1;
    IF FOUND THEN {raising(FROZEN)} END IF;
    RETURN NULL;
END"""

CONTRASTS = "SELECT id FROM recipes WHERE stage = 'contrast'"
FORGET = (
    f"DELETE FROM recipe_inputs WHERE recipe_id IN ({CONTRASTS})",
    "DELETE FROM runs WHERE stage = 'contrast'",
    "DELETE FROM recipes WHERE stage = 'contrast'",
)


def upgrade() -> None:
    op.add_column("splits", sa.Column("family", NAME, nullable=True))
    op.add_column("splits", sa.Column("fold", sa.Integer(), nullable=True))
    op.create_table(
        "split_groups",
        sa.Column("split_id", BIG_ID, nullable=False),
        sa.Column("group_id", BIG_ID, nullable=False, autoincrement=False),
        sa.Column("subset", SIDE, nullable=False),
        sa.ForeignKeyConstraint(
            ["split_id"], ["splits.id"], name=op.f("fk_split_groups_split_id_splits")
        ),
        sa.PrimaryKeyConstraint("split_id", "group_id", name=op.f("pk_split_groups")),
    )
    op.execute(GROUPS_SO_FAR)
    op.execute(FREEZE_WHAT_RUNS_USE)
    guard()


def guard() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name, (when, body) in SQLITE.items():
            op.execute(f"CREATE TRIGGER {name} {when} BEGIN {body} END")
        return
    for name, (when, body) in POSTGRESQL.items():
        make_function(name, body)
        op.execute(f"CREATE TRIGGER {name} {when} EXECUTE FUNCTION {name}()")
    make_function("splits_emptied", EMPTIED_BODY)
    for table in EMPTIED:
        op.execute(
            f"CREATE TRIGGER {table}_emptied BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION splits_emptied()"
        )


def make_function(name: str, body: str) -> None:
    op.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")


def downgrade() -> None:
    """Go back; a split by treatment keeps wells together too, and that older code can read."""
    unguard()
    op.execute("UPDATE splits SET group_level = 'well' WHERE group_level = 'treatment'")
    op.drop_table("split_groups")
    for statement in FORGET:  # a stage that older code does not know
        op.execute(statement)
    with op.batch_alter_table("splits") as batch:
        batch.drop_column("fold")
        batch.drop_column("family")


def unguard() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name in SQLITE:
            op.execute(f"DROP TRIGGER {name}")
        return
    for name, (when, _) in POSTGRESQL.items():
        table = when.split(" ON ")[1].split()[0]
        op.execute(f"DROP TRIGGER {name} ON {table}")
        op.execute(f"DROP FUNCTION {name}()")
    for table in EMPTIED:
        op.execute(f"DROP TRIGGER {table}_emptied ON {table}")
    op.execute("DROP FUNCTION splits_emptied()")
