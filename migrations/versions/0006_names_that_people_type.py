"""Names that people type: images by the start of their sha256, ingested tables by name

Revision: 0006
Follows: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

KNOWN_BYTES = sa.text("content_sha256 IS NOT NULL")


def upgrade() -> None:
    op.create_index(
        op.f("ix_images_content_sha256"),
        "images",
        ["content_sha256"],
        sqlite_where=KNOWN_BYTES,
        postgresql_where=KNOWN_BYTES,
    )
    op.create_index(op.f("ix_ingest_files_name"), "ingest_files", ["name"])


def downgrade() -> None:
    op.drop_index(op.f("ix_ingest_files_name"), "ingest_files")
    op.drop_index(op.f("ix_images_content_sha256"), "images")
