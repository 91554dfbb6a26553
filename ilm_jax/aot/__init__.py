"""Ahead-of-time compilation: the memory, collectives and roofline of a config on devices that are not attached.

Imports every room. Start with `compile.py`, the command `ilm-jax compile`; `hlo.py` reads the compiled programs.
"""
