"""From rows to arrays and back: pixels, masks, cells, and the files of feature sets."""
