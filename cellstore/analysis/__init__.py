"""Pure computation on arrays: no database, no store."""
