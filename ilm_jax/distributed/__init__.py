"""Running on several devices and processes: the device mesh, array sharding, and synchronization of processes.

Imports only `ilm_jax.types` and `ilm_jax.console`. Start with `sharding.py`.
"""
