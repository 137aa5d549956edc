"""The eight segmentation methods: one module a family, their shared blocks, their training."""
