"""The transformer, its vocabulary head and numerics, and the conversion of the reference implementation's weights.

Start with `transformer.py`; its settings are in `config.py`, its layers in `layers.py` and `attention.py`. Only this
package imports Flax. It may import `ilm_jax.types` and `ilm_jax.distributed`.
"""
