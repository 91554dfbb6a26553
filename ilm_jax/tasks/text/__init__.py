"""The text task (`task.py`) and the corpora that it reads (`corpora.py`)."""
