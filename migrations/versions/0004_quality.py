"""Quality: what is measured of each image, and what a quality-control run found odd

Revision: 0004
Follows: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
FLOAT = sa.Float(precision=53)
NAME = sa.String(length=255)
MAY_BE_UNKNOWN = ("power_log_log_slope", "sharpness")
KNOWN = ("saturated", "maximal", "background", "median", "mean", "std")
FORGET = (
    "DELETE FROM jobs WHERE recipe_id IN (SELECT id FROM recipes WHERE stage = 'qc')",
    "DELETE FROM recipe_inputs WHERE recipe_id IN (SELECT id FROM recipes WHERE stage = 'qc')",
    "DELETE FROM recipe_inputs WHERE input_id IN (SELECT id FROM recipes WHERE stage = 'qc')",
    "DELETE FROM runs WHERE stage = 'qc'",
    "DELETE FROM recipes WHERE stage = 'qc'",
)


def upgrade() -> None:
    op.create_table(
        "image_quality",
        refers("image_id"),
        refers("recipe_id"),
        sa.Column("content_sha256", sa.String(length=64), nullable=False),
        sa.Column("channel", NAME, nullable=False),
        refers("run_id"),
        *(sa.Column(name, FLOAT, nullable=True) for name in MAY_BE_UNKNOWN),
        *(sa.Column(name, FLOAT, nullable=False) for name in KNOWN),
        foreign("image_quality", "image_id", "images"),
        foreign("image_quality", "recipe_id", "recipes"),
        foreign("image_quality", "run_id", "runs"),
        sa.PrimaryKeyConstraint(
            *("image_id", "recipe_id", "content_sha256", "channel"),
            name=op.f("pk_image_quality"),
        ),
    )
    op.create_index(op.f("ix_image_quality_run_id"), "image_quality", ["run_id"])
    op.create_table(
        "image_flags",
        refers("run_id"),
        refers("image_id"),
        sa.Column("reason", sa.String(length=20), nullable=False),
        sa.Column("channel", NAME, nullable=False),
        sa.Column("value", FLOAT, nullable=False),
        sa.Column("low", FLOAT, nullable=True),
        sa.Column("high", FLOAT, nullable=True),
        foreign("image_flags", "run_id", "runs"),
        foreign("image_flags", "image_id", "images"),
        sa.PrimaryKeyConstraint(
            *("run_id", "image_id", "reason", "channel"), name=op.f("pk_image_flags")
        ),
    )
    op.create_index(op.f("ix_image_flags_image_id"), "image_flags", ["image_id"])
    op.create_table(
        "cell_flags",
        refers("run_id"),
        refers("cell_id"),
        sa.Column("reason", sa.String(length=20), nullable=False),
        sa.Column("value", FLOAT, nullable=True),
        foreign("cell_flags", "run_id", "runs"),
        foreign("cell_flags", "cell_id", "cells"),
        sa.PrimaryKeyConstraint("run_id", "cell_id", "reason", name=op.f("pk_cell_flags")),
    )
    op.create_index(op.f("ix_cell_flags_cell_id"), "cell_flags", ["cell_id"])


def downgrade() -> None:
    """Go back; a stage that older code does not know would stop it from reading any run."""
    op.drop_table("cell_flags")
    op.drop_table("image_flags")
    op.drop_table("image_quality")
    for statement in FORGET:
        op.execute(statement)


def refers(column: str) -> sa.Column[int]:
    return sa.Column(column, BIG_ID, nullable=False)


def foreign(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [f"{other}.id"], name=op.f(f"fk_{table}_{column}_{other}")
    )
