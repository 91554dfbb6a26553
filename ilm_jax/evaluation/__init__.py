"""Evaluation of models and of generated text: accuracy, likelihood, generative perplexity, infilling, result tables.

May import every package except `training`. Start with `evaluate.py`, which the training loop calls; `report.py`,
`generative_perplexity.py` and `infill_sets.py` are commands of `ilm-jax`.
"""
