"""The outside world: readers of tables, names and images; they yield plain records."""
