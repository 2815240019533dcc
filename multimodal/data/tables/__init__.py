"""Files that list images and texts: their rows, and the samples that these are."""
