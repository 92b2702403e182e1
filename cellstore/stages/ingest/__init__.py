"""Ingest: tables, indexes, folders and databases of others become rows of the store."""
