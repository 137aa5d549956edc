"""Segmentation methods behind one protocol, what they say about their own confidence, and the measures of accuracy."""
