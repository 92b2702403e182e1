"""Named, described SQL."""
