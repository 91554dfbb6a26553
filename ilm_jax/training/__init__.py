"""Training: what a config names (`experiment.py`), one step (`train_step.py`), and the loop around it (`loop.py`).

Imports every room but `aot`. Start with `train_step.py`.
"""
