"""The outside world: readers of tables, names, images and masks. They yield plain records."""
