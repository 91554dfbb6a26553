"""Several devices and several processes: the mesh, where each array lies on it, and how processes agree and stop.

Imports `types` and `console` only. Start with `sharding.py`: its table maps logical axis names to mesh axes.
"""
