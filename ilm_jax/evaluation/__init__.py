"""Measures of a model and of its samples: accuracy, likelihood, generative perplexity, infilling, tables of runs.

Imports every room but `training`. Start with `evaluate.py`, which the training loop calls.
"""
