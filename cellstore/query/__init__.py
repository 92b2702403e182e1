"""Questions about a store: DuckDB over the database and its cached copies."""
