"""Fields of view: tables, indexes and folders that say which images there are."""
