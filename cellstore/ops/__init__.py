"""Pure computation on arrays and tensors; no database, no store."""
