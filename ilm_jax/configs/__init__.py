"""The configs that come with the package: `get_config(variant)` of each module returns all settings of a run.

These modules import only ml_collections. `ilm-jax configs` lists them; --config=star:tiny uses one by its name, and
your own config file can start from `default.get_config()`. Start with `default.py`, which explains every setting.
"""
