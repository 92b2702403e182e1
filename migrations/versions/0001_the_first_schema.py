"""The first schema

Revision: 0001
Follows:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

# Predictions are append only: what a run once said stays, whoever holds the connection.
SQLITE_GUARD = """
CREATE TRIGGER predictions_keep_{verb} BEFORE {verb} ON predictions
BEGIN SELECT RAISE(ABORT, 'predictions are append-only'); END
"""
POSTGRESQL_FUNCTION = """
CREATE FUNCTION predictions_keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'predictions are append-only'; END $$
"""
POSTGRESQL_GUARD = """
CREATE TRIGGER predictions_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON predictions
FOR EACH STATEMENT EXECUTE FUNCTION predictions_keep()
"""


def guard_predictions() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(SQLITE_GUARD.format(verb=verb))
        return
    op.execute(POSTGRESQL_FUNCTION)
    op.execute(POSTGRESQL_GUARD)


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column(
            "kind",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", BIG_ID, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifacts")),
        sa.UniqueConstraint("path", name=op.f("uq_artifacts_path")),
        sa.UniqueConstraint("sha256", "kind", name=op.f("uq_artifacts_sha256_kind")),
    )
    op.create_table(
        "labels",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column(
            "field",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("value", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_labels")),
        sa.UniqueConstraint("field", "value", name=op.f("uq_labels_field_value")),
    )
    op.create_table(
        "plates",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("barcode", sa.String(length=255), nullable=False),
        sa.Column("batch", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plates")),
        sa.UniqueConstraint("barcode", name=op.f("uq_plates_barcode")),
    )
    op.create_table(
        "recipes",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column(
            "stage",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("weights_sha256", sa.String(length=64), nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recipes")),
        sa.UniqueConstraint("stage", "fingerprint", name=op.f("uq_recipes_stage_fingerprint")),
    )
    op.create_table(
        "treatments",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column(
            "kind",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("pert_iname", sa.String(length=255), nullable=False),
        sa.Column("target", sa.String(length=255), nullable=True),
        sa.Column(
            "control",
            sa.String(length=20),
            nullable=True,
        ),
        sa.Column("identifier", sa.String(length=255), nullable=True),
        sa.Column("inchikey", sa.String(length=255), nullable=True),
        sa.Column("smiles", sa.Text(), nullable=True),
        sa.Column("pubchem_cid", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_treatments")),
        sa.UniqueConstraint("identity", name=op.f("uq_treatments_identity")),
    )
    op.create_index(op.f("ix_treatments_pert_iname"), "treatments", ["pert_iname"])

    op.create_table(
        "feature_sets",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_feature_sets_recipe_id_recipes")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feature_sets")),
        sa.UniqueConstraint("name", name=op.f("uq_feature_sets_name")),
        sa.UniqueConstraint("recipe_id", name=op.f("uq_feature_sets_recipe_id")),
    )
    op.create_table(
        "recipe_inputs",
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("input_id", BIG_ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["input_id"], ["recipes.id"], name=op.f("fk_recipe_inputs_input_id_recipes")
        ),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_recipe_inputs_recipe_id_recipes")
        ),
        sa.PrimaryKeyConstraint("recipe_id", "input_id", name=op.f("pk_recipe_inputs")),
    )
    op.create_index(op.f("ix_recipe_inputs_input_id"), "recipe_inputs", ["input_id"])

    op.create_table(
        "splits",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("protocol", sa.String(length=255), nullable=False),
        sa.Column(
            "field",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column(
            "group_level",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("left_out", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("frozen_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_splits_recipe_id_recipes")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_splits")),
        sa.UniqueConstraint("name", name=op.f("uq_splits_name")),
    )
    op.create_table(
        "wells",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("plate_id", BIG_ID, nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("column", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("treatment_id", BIG_ID, nullable=True),
        sa.ForeignKeyConstraint(["plate_id"], ["plates.id"], name=op.f("fk_wells_plate_id_plates")),
        sa.ForeignKeyConstraint(
            ["treatment_id"], ["treatments.id"], name=op.f("fk_wells_treatment_id_treatments")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_wells")),
        sa.UniqueConstraint("plate_id", "row", "column", name=op.f("uq_wells_plate_id_row_column")),
    )
    op.create_index(op.f("ix_wells_treatment_id"), "wells", ["treatment_id"])

    op.create_table(
        "images",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("well_id", BIG_ID, nullable=False),
        sa.Column("site", sa.Integer(), nullable=False),
        sa.Column("plane", sa.Integer(), nullable=False),
        sa.Column("time_point", sa.Integer(), nullable=False),
        sa.Column("core_name", sa.String(length=255), nullable=False),
        sa.Column("content_sha256", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["well_id"], ["wells.id"], name=op.f("fk_images_well_id_wells")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_images")),
        sa.UniqueConstraint(
            "well_id",
            "site",
            "plane",
            "time_point",
            name=op.f("uq_images_well_id_site_plane_time_point"),
        ),
    )
    op.create_index(op.f("ix_images_core_name"), "images", ["core_name"])

    op.create_table(
        "runs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column(
            "stage",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("parent_id", BIG_ID, nullable=True),
        sa.Column("split_id", BIG_ID, nullable=True),
        sa.Column(
            "status",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("seed", sa.Integer(), nullable=True),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("query", sa.Text(), nullable=True),
        sa.Column("code_version", sa.String(length=255), nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["parent_id"], ["runs.id"], name=op.f("fk_runs_parent_id_runs")),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_runs_recipe_id_recipes")
        ),
        sa.ForeignKeyConstraint(["split_id"], ["splits.id"], name=op.f("fk_runs_split_id_splits")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_index(op.f("ix_runs_parent_id"), "runs", ["parent_id"])
    op.create_index(op.f("ix_runs_split_id"), "runs", ["split_id"])
    op.create_index(op.f("ix_runs_stage_runs_recipe_id"), "runs", ["stage", "recipe_id"])

    op.create_table(
        "image_files",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("channel", sa.String(length=255), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("uri", sa.Text(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", BIG_ID, nullable=True),
        sa.Column("modified_ns", BIG_ID, nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("dtype", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name=op.f("fk_image_files_image_id_images")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_image_files")),
        sa.UniqueConstraint("image_id", "channel", name=op.f("uq_image_files_image_id_channel")),
    )
    op.create_index(op.f("ix_image_files_name"), "image_files", ["name"])
    op.create_index(op.f("ix_image_files_sha256"), "image_files", ["sha256"])

    op.create_table(
        "jobs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("content_sha256", sa.String(length=64), nullable=False),
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column(
            "status",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=255), nullable=True),
        sa.Column("lease_until", sa.Float(precision=53), nullable=True),
        sa.Column("seconds", sa.Float(precision=53), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name=op.f("fk_jobs_image_id_images")),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_jobs_recipe_id_recipes")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_jobs_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint(
            "recipe_id",
            "image_id",
            "content_sha256",
            name=op.f("uq_jobs_recipe_id_image_id_content_sha256"),
        ),
    )
    op.create_index(op.f("ix_jobs_image_id"), "jobs", ["image_id"])
    op.create_index(
        op.f("ix_jobs_recipe_id_jobs_status_jobs_id"), "jobs", ["recipe_id", "status", "id"]
    )
    op.create_index(op.f("ix_jobs_run_id"), "jobs", ["run_id"])

    op.create_table(
        "run_artifacts",
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("artifact_id", BIG_ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifacts.id"], name=op.f("fk_run_artifacts_artifact_id_artifacts")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_artifacts_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "artifact_id", name=op.f("pk_run_artifacts")),
    )
    op.create_index(op.f("ix_run_artifacts_artifact_id"), "run_artifacts", ["artifact_id"])

    op.create_table(
        "run_metrics",
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("value", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_metrics_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "epoch", "name", name=op.f("pk_run_metrics")),
    )
    op.create_table(
        "segmentations",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("content_sha256", sa.String(length=64), nullable=False),
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("n_cells", sa.Integer(), nullable=False),
        sa.Column("diameter", sa.Float(precision=53), nullable=False),
        sa.Column("mask_artifact_id", BIG_ID, nullable=False),
        sa.Column("flow_artifact_id", BIG_ID, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["flow_artifact_id"],
            ["artifacts.id"],
            name=op.f("fk_segmentations_flow_artifact_id_artifacts"),
        ),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name=op.f("fk_segmentations_image_id_images")
        ),
        sa.ForeignKeyConstraint(
            ["mask_artifact_id"],
            ["artifacts.id"],
            name=op.f("fk_segmentations_mask_artifact_id_artifacts"),
        ),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_segmentations_recipe_id_recipes")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_segmentations_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segmentations")),
        sa.UniqueConstraint(
            "image_id",
            "recipe_id",
            "content_sha256",
            name=op.f("uq_segmentations_image_id_recipe_id_content_sha256"),
        ),
    )
    op.create_index(
        op.f("ix_segmentations_flow_artifact_id"), "segmentations", ["flow_artifact_id"]
    )
    op.create_index(
        op.f("ix_segmentations_mask_artifact_id"), "segmentations", ["mask_artifact_id"]
    )
    op.create_index(op.f("ix_segmentations_recipe_id"), "segmentations", ["recipe_id"])
    op.create_index(op.f("ix_segmentations_run_id"), "segmentations", ["run_id"])

    op.create_table(
        "split_members",
        sa.Column("split_id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column(
            "subset",
            sa.String(length=20),
            nullable=False,
        ),
        sa.Column("label_id", BIG_ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name=op.f("fk_split_members_image_id_images")
        ),
        sa.ForeignKeyConstraint(
            ["label_id"], ["labels.id"], name=op.f("fk_split_members_label_id_labels")
        ),
        sa.ForeignKeyConstraint(
            ["split_id"], ["splits.id"], name=op.f("fk_split_members_split_id_splits")
        ),
        sa.PrimaryKeyConstraint("split_id", "image_id", name=op.f("pk_split_members")),
    )
    op.create_index(op.f("ix_split_members_image_id"), "split_members", ["image_id"])

    op.create_table(
        "cells",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("segmentation_id", BIG_ID, nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("min_row", sa.Integer(), nullable=False),
        sa.Column("min_col", sa.Integer(), nullable=False),
        sa.Column("max_row", sa.Integer(), nullable=False),
        sa.Column("max_col", sa.Integer(), nullable=False),
        sa.Column("centroid_row", sa.Float(precision=53), nullable=False),
        sa.Column("centroid_col", sa.Float(precision=53), nullable=False),
        sa.Column("excluded", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(
            ["segmentation_id"],
            ["segmentations.id"],
            name=op.f("fk_cells_segmentation_id_segmentations"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cells")),
        sa.UniqueConstraint(
            "segmentation_id", "label", name=op.f("uq_cells_segmentation_id_label")
        ),
    )
    op.create_table(
        "features",
        sa.Column("cell_id", BIG_ID, nullable=False),
        sa.Column("recipe_id", BIG_ID, nullable=False),
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("area", sa.Float(precision=53), nullable=True),
        sa.Column("convex_area", sa.Float(precision=53), nullable=True),
        sa.Column("perimeter", sa.Float(precision=53), nullable=True),
        sa.Column("eccentricity", sa.Float(precision=53), nullable=True),
        sa.Column("mean_intensity", sa.Float(precision=53), nullable=True),
        sa.Column("min_intensity", sa.Float(precision=53), nullable=True),
        sa.Column("max_intensity", sa.Float(precision=53), nullable=True),
        sa.Column("major_axis_length", sa.Float(precision=53), nullable=True),
        sa.Column("minor_axis_length", sa.Float(precision=53), nullable=True),
        sa.Column("orientation", sa.Float(precision=53), nullable=True),
        sa.Column("solidity", sa.Float(precision=53), nullable=True),
        sa.Column("extent", sa.Float(precision=53), nullable=True),
        sa.Column("centroid_y", sa.Float(precision=53), nullable=True),
        sa.Column("centroid_x", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name=op.f("fk_features_cell_id_cells")),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_features_recipe_id_recipes")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_features_run_id_runs")),
        sa.PrimaryKeyConstraint("cell_id", "recipe_id", name=op.f("pk_features")),
    )
    op.create_index(op.f("ix_features_run_id"), "features", ["run_id"])

    op.create_table(
        "predictions",
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("cell_id", BIG_ID, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("label_id", BIG_ID, nullable=False),
        sa.Column("probability", sa.Float(precision=53), nullable=False),
        sa.CheckConstraint(
            "probability >= 0 AND probability <= 1", name=op.f("ck_predictions_probability")
        ),
        sa.CheckConstraint("rank >= 1", name=op.f("ck_predictions_rank")),
        sa.ForeignKeyConstraint(
            ["cell_id"], ["cells.id"], name=op.f("fk_predictions_cell_id_cells")
        ),
        sa.ForeignKeyConstraint(
            ["label_id"], ["labels.id"], name=op.f("fk_predictions_label_id_labels")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_predictions_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "cell_id", "rank", name=op.f("pk_predictions")),
    )
    op.create_index(op.f("ix_predictions_cell_id"), "predictions", ["cell_id"])

    guard_predictions()


def downgrade() -> None:
    op.drop_table("predictions")
    op.drop_table("features")
    op.drop_table("cells")
    op.drop_table("split_members")
    op.drop_table("segmentations")
    op.drop_table("run_metrics")
    op.drop_table("run_artifacts")
    op.drop_table("jobs")
    op.drop_table("image_files")
    op.drop_table("runs")
    op.drop_table("images")
    op.drop_table("wells")
    op.drop_table("splits")
    op.drop_table("recipe_inputs")
    op.drop_table("feature_sets")
    op.drop_table("treatments")
    op.drop_table("recipes")
    op.drop_table("plates")
    op.drop_table("labels")
    op.drop_table("artifacts")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION predictions_keep()")
