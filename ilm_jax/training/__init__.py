"""Training: build and check the model, task and mesh (`experiment.py`, `checks.py`), the update step, and the loop.

May import every package of `ilm_jax` except `aot`. Read `train_step.py` first, then `loop.py`.
"""
