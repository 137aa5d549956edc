"""Segmentation by expressions such as the large building on the left: samples, expressions made from masks, a segmenter."""
