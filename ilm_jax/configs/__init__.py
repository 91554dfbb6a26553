"""The configs that come with the package: `get_config(variant)` returns all settings of a run.

Imports ml_collections only. `ilm-jax configs` lists them; --config=star:tiny uses one by its name, and a config file of
your own can start from `default.get_config()`. Start with `default.py`, which explains every setting.
"""
