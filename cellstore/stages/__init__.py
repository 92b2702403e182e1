"""What can be done with a store. Stages never import each other: they meet in rows and files."""
