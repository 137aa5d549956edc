"""Semi-supervised training: which labels of a teacher may a network learn from?"""
