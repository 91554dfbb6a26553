"""Evaluation of models and of generated text: accuracy, likelihood, generative perplexity, infilling, result tables.

May import every package of `ilm_jax` except `training` and `aot`. Read `evaluate.py` first, which the training loop
calls; `report.py`, `generative_perplexity.py`, `infill_sets.py` and `convert.py` are commands of `ilm-jax`.
"""
