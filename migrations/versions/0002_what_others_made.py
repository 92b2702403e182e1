"""What others made: folders of images, cells and features of other tools, the account of an ingest

Revision: 0002
Follows: 0001
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SHA256 = sa.String(length=64)
FLOAT = sa.Float(precision=53)
BOX = ("min_row", "min_col", "max_row", "max_col")
CENTRE = ("centroid_row", "centroid_col")
MANY = 10_000

FILES = sa.table(
    "image_files",
    sa.column("id"),
    sa.column("uri"),
    sa.column("name"),
    sa.column("folder_id"),
)
FOLDERS = sa.table("folders", sa.column("id"), sa.column("uri"))


def upgrade() -> None:
    new_tables()
    op.add_column("image_files", sa.Column("folder_id", BIG_ID, nullable=True))
    uris_to_folders()
    op.drop_index(op.f("ix_image_files_sha256"), "image_files")
    with op.batch_alter_table("image_files") as batch:
        batch.drop_column("uri")
        batch.create_foreign_key(
            op.f("fk_image_files_folder_id_folders"), "folders", ["folder_id"], ["id"]
        )
    seen = sa.text("sha256 IS NOT NULL")
    op.create_index(
        op.f("ix_image_files_sha256"),
        "image_files",
        ["sha256"],
        sqlite_where=seen,
        postgresql_where=seen,
    )
    op.add_column(
        "feature_sets",
        sa.Column("storage", sa.String(length=20), nullable=False, server_default="table"),
    )
    with op.batch_alter_table("feature_sets") as batch:
        batch.alter_column("storage", existing_type=sa.String(length=20), server_default=None)
    op.create_index(op.f("ix_treatments_identifier"), "treatments", ["identifier"])
    # A name that SQL can use without quotes.
    op.execute("UPDATE feature_sets SET name = replace(name, '-', '_') WHERE name LIKE 'basic-%'")
    may_be_unknown(nullable=True)
    targets(sa.String(length=255), sa.Text())
    unknown = sa.text("content_sha256 IS NULL")
    op.create_index(
        op.f("uq_segmentations_of_unknown_bytes"),
        "segmentations",
        ["image_id", "recipe_id"],
        unique=True,
        sqlite_where=unknown,
        postgresql_where=unknown,
    )


def downgrade() -> None:
    """Go back; what has no place in the old schema must not be there."""
    op.drop_index(op.f("uq_segmentations_of_unknown_bytes"), "segmentations")
    op.drop_index(op.f("ix_treatments_identifier"), "treatments")
    targets(sa.Text(), sa.String(length=255))
    may_be_unknown(nullable=False)
    op.drop_table("well_changes")
    op.drop_table("ingest_issues")
    op.drop_table("ingest_files")
    op.drop_table("feature_files")
    with op.batch_alter_table("feature_sets") as batch:
        batch.drop_column("storage")
    op.add_column("image_files", sa.Column("uri", sa.Text(), nullable=True))
    folders_to_uris()
    op.drop_index(op.f("ix_image_files_sha256"), "image_files")
    with op.batch_alter_table("image_files") as batch:
        batch.drop_constraint(op.f("fk_image_files_folder_id_folders"), type_="foreignkey")
        batch.drop_column("folder_id")
    op.create_index(op.f("ix_image_files_sha256"), "image_files", ["sha256"])
    op.drop_table("folders")


def targets(old: sa.types.TypeEngine[str], new: sa.types.TypeEngine[str]) -> None:
    """Lists of targets are longer than names."""
    with op.batch_alter_table("treatments") as batch:
        batch.alter_column("target", existing_type=old, type_=new, existing_nullable=True)
    with op.batch_alter_table("labels") as batch:
        batch.alter_column("value", existing_type=old, type_=new, existing_nullable=False)


def may_be_unknown(*, nullable: bool) -> None:
    with op.batch_alter_table("segmentations") as batch:
        batch.alter_column("content_sha256", existing_type=SHA256, nullable=nullable)
        batch.alter_column("diameter", existing_type=FLOAT, nullable=nullable)
        for name in ("mask_artifact_id", "flow_artifact_id"):
            batch.alter_column(name, existing_type=BIG_ID, nullable=nullable)
    with op.batch_alter_table("cells") as batch:
        for name in BOX:
            batch.alter_column(name, existing_type=sa.Integer(), nullable=nullable)
        for name in CENTRE:
            batch.alter_column(name, existing_type=FLOAT, nullable=nullable)


def uris_to_folders() -> None:
    bind = op.get_bind()
    folders: dict[str, int] = {}
    for rows in batches("uri"):
        found = {row.id: PurePath(row.uri) for row in rows}
        for folder in sorted({str(path.parent) for path in found.values()} - folders.keys()):
            folders[folder] = len(folders) + 1
            bind.execute(FOLDERS.insert().values(id=folders[folder], uri=folder))
        for key, path in found.items():
            values = {"folder_id": folders[str(path.parent)], "name": path.name}
            bind.execute(FILES.update().where(FILES.c.id == key).values(**values))
    if folders and bind.dialect.name == "postgresql":
        op.execute("SELECT setval(pg_get_serial_sequence('folders', 'id'), max(id)) FROM folders")


def folders_to_uris() -> None:
    bind = op.get_bind()
    names = {row.id: row.uri for row in bind.execute(sa.select(FOLDERS))}
    for rows in batches("folder_id"):
        for row in rows:
            uri = f"{names[row.folder_id]}/{row.name}"
            bind.execute(FILES.update().where(FILES.c.id == row.id).values(uri=uri))


def batches(column: str) -> Iterator[Sequence[Any]]:
    """Yield the files that have a value in ``column``, some at a time."""
    last = 0
    columns = (FILES.c.id, FILES.c.name, FILES.c[column])
    while True:
        query = sa.select(*columns).where(FILES.c.id > last, FILES.c[column].is_not(None))
        rows = op.get_bind().execute(query.order_by(FILES.c.id).limit(MANY)).all()
        if not rows:
            return
        yield rows
        last = rows[-1].id


def new_tables() -> None:
    op.create_table(
        "folders",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_folders")),
        sa.UniqueConstraint("uri", name=op.f("uq_folders_uri")),
    )
    op.create_table(
        "feature_files",
        refers("feature_set_id"),
        refers("artifact_id"),
        refers("run_id"),
        sa.Column("n_rows", sa.Integer(), nullable=False),
        sa.Column("first_cell_id", BIG_ID, nullable=False),
        sa.Column("last_cell_id", BIG_ID, nullable=False),
        foreign("feature_files", "feature_set_id", "feature_sets"),
        foreign("feature_files", "artifact_id", "artifacts"),
        foreign("feature_files", "run_id", "runs"),
        sa.PrimaryKeyConstraint("feature_set_id", "artifact_id", name=op.f("pk_feature_files")),
    )
    op.create_index(op.f("ix_feature_files_artifact_id"), "feature_files", ["artifact_id"])
    op.create_index(op.f("ix_feature_files_run_id"), "feature_files", ["run_id"])
    op.create_table(
        "ingest_files",
        sa.Column("id", BIG_ID, nullable=False),
        refers("run_id"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", SHA256, nullable=False),
        sa.Column("size_bytes", BIG_ID, nullable=False),
        sa.Column("layout", sa.String(length=255), nullable=False),
        sa.Column("n_rows", BIG_ID, nullable=False),
        sa.Column("n_created", BIG_ID, nullable=False),
        sa.Column("n_updated", BIG_ID, nullable=False),
        sa.Column("n_unchanged", BIG_ID, nullable=False),
        sa.Column("n_refused", BIG_ID, nullable=False),
        foreign("ingest_files", "run_id", "runs"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingest_files")),
    )
    op.create_index(op.f("ix_ingest_files_run_id"), "ingest_files", ["run_id"])
    op.create_index(op.f("ix_ingest_files_sha256"), "ingest_files", ["sha256"])
    op.create_table(
        "ingest_issues",
        sa.Column("id", BIG_ID, nullable=False),
        refers("run_id"),
        sa.Column("severity", sa.String(length=20), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("line", BIG_ID, nullable=True),
        sa.Column("reason", sa.String(length=255), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        foreign("ingest_issues", "run_id", "runs"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingest_issues")),
    )
    op.create_index(op.f("ix_ingest_issues_run_id"), "ingest_issues", ["run_id"])
    op.create_table(
        "well_changes",
        sa.Column("id", BIG_ID, nullable=False),
        refers("run_id"),
        refers("well_id"),
        refers("old_treatment_id", nullable=True),
        refers("new_treatment_id", nullable=True),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("line", BIG_ID, nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        foreign("well_changes", "run_id", "runs"),
        foreign("well_changes", "well_id", "wells"),
        foreign("well_changes", "old_treatment_id", "treatments"),
        foreign("well_changes", "new_treatment_id", "treatments"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_well_changes")),
    )
    op.create_index(op.f("ix_well_changes_run_id"), "well_changes", ["run_id"])
    op.create_index(op.f("ix_well_changes_well_id"), "well_changes", ["well_id"])


def refers(column: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(column, BIG_ID, nullable=nullable)


def foreign(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [f"{other}.id"], name=op.f(f"fk_{table}_{column}_{other}")
    )
