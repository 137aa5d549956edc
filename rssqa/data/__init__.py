"""Images, masks and image-text pairs: synthetic scenes, datasets on disk, splits without leaks, downloads."""
