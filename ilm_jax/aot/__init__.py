"""Ahead-of-time compilation: the memory, collectives and roofline of a config on devices that are not attached.

This package may import every other package of ilm_jax. Start with `compile.py`, the command `ilm-jax compile`;
`hlo.py` parses the compiled programs.
"""
