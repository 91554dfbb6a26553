"""From text to batches: tokenizers, prepared data on disk, and the grain pipeline that packs examples into rows.

Imports `types`, `special_tokens` and, for the corruption that runs in the data workers, `families.corruption`. Nothing
here starts a JAX backend. Start with `pipeline.py`.
"""
