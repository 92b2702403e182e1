"""Jobs that survive: when one is tried again, how many workers died over it, whose a run is

Revision: 0003
Follows: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("deaths", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    op.add_column("jobs", sa.Column("not_before", sa.Float(precision=53), nullable=True))
    op.add_column("runs", sa.Column("process", sa.String(length=255), nullable=True))
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("deaths", existing_type=sa.Integer(), server_default=None)


def downgrade() -> None:
    op.execute("UPDATE runs SET status = 'failed' WHERE status = 'cancelled'")
    with op.batch_alter_table("runs") as batch:
        batch.drop_column("process")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("not_before")
        batch.drop_column("deaths")
