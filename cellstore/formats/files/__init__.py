"""Image files: where they are, what they hold, which of them are masks."""
