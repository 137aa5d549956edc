"""Features and quality tables on disk: one row is one segmentation of one image."""
