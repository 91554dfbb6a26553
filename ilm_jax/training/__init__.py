"""Training: build model, task and mesh (`experiment.py`), the update step (`train_step.py`), and the loop (`loop.py`).

May import every package of `ilm_jax` except `aot`. Read `train_step.py` first, then `loop.py`.
"""
