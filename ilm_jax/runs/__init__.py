"""The folder of a run (its workdir): checkpoints, event files, run.json, and the lock against a second process.

Of this package, it may import only `types`, `metrics` and `distributed`. Read `run_file.py` first, then
`checkpoint.py`.
"""
