"""A trained model in use: the Python API, batching of requests, infilling, stopping rules and traces.

Imports every room but `evaluation` and `training`. Start with `api.py`: `load` and `LanguageModel`.
"""
