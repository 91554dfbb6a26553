"""Zebra puzzles: the task (`task.py`), the puzzles with their solver (`puzzles.py`), the released files (`released.py`)."""
