"""The folder of a run (its workdir): checkpoints, event files, run.json, and the lock against a second process.

May import `types`, `metrics` and `distributed`. Start with `run_file.py`, then `checkpoint.py`.
"""
