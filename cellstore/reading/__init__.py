"""From rows to arrays: the pixels of an image, its masks, its cells."""
