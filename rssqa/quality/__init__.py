"""Predicting accuracy without labels: RS-SQA, the consensus model, baselines, intervals, recommendation."""
