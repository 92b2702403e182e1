"""Features of other tools: cells without masks, and files of their values."""
