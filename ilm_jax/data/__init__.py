"""From text to batches: tokenizers, prepared data on disk, and the grain pipeline that packs examples into rows.

Of ilm_jax, this package imports only `types` and `special_tokens`, and it never starts a JAX backend. Read `packing.py`
and `pipeline.py` first.
"""
