"""Text tables: how they are split into rows, and what their cells say."""
