"""The transformer, its vocabulary head and its numerics; conversion of the reference implementation's weights.

Imports `types` and `distributed`. Start with `transformer.py`; it is the only module that imports Flax.
"""
