"""Training: the parts that a config names (`experiment.py`), one update (`train_step.py`), and the loop (`loop.py`).

May import every room except `aot`. Start with `train_step.py`, then `loop.py`.
"""
