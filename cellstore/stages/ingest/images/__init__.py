"""Images: rows of the store for what a table, an index or a folder says."""
