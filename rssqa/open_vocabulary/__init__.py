"""Segmentation by words: any vision-language encoder and a class list, without training."""
