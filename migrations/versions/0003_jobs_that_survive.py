"""Jobs that survive: when a failed one is tried again, and how many workers died over it

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
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("deaths", existing_type=sa.Integer(), server_default=None)


def downgrade() -> None:
    op.execute("UPDATE runs SET status = 'failed' WHERE status = 'cancelled'")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("not_before")
        batch.drop_column("deaths")
