"""Alembic environment and revisions; frozen, independent of the live models."""
