"""From text to batches: tokenizers, prepared data on disk, and the grain pipeline that packs examples into rows.

Imports `types` and `special_tokens`; no module here starts a JAX backend. Start with `packing.py` and `pipeline.py`.
"""
