"""What the pages of several stages share: figures, pictures, the look of a page."""
