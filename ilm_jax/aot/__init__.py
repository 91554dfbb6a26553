"""Ahead-of-time compilation: estimates of memory, communication and step time on devices that are not attached.

This package may import every other package of ilm_jax. Start with `compile.py`, the command `ilm-jax compile`;
`hlo.py` parses the compiled programs.
"""
