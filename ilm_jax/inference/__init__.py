"""Inference with a trained model: Python API, static and continuous batching, infilling, stopping rules and traces.

May import every package of `ilm_jax` except `evaluation`, `training` and `aot`. Read `load` and `LanguageModel` in
`api.py` first.
"""
