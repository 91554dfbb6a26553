"""Zebra puzzles: from clues about a row of houses, work out which house has which value of each attribute.

    clues.py       clues, their meaning, their text form, and the split of a puzzle
    solver.py      a rule-based solver, and a search for any solution
    generator.py   random puzzles
    encoding.py    puzzles as token ids
    released.py    the puzzles that Shah et al. released, read from their pickle files
    source.py      the examples of a split: generated, cached on disk, or released
    task.py        the task: scores, prompts, text

Each file imports only files above it in this list. Start with clues.py, or with task.py for the contract of a task.
"""
