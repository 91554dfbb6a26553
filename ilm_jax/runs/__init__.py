"""The folder of a run (its workdir): checkpoints, event files, run.json, and the lock against a second process.

May import only `types`, `paths`, `metrics` and `distributed`. Read `run_file.py` first, then `checkpoint.py`.
"""
