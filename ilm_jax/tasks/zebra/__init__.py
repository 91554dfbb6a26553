"""Zebra puzzles: from clues about a row of houses, work out which house has which value of each attribute.

    clues.py       clues, their meaning, their text form, and the split of a puzzle
    solver.py      a rule-based solver, and a backtracking search for any solution
    generator.py   a generator of random puzzles
    released.py    a reader for the pickle files of puzzles that Shah et al. released
    source.py      the examples of a split as token ids: generated, cached on disk, or released
    task.py        the task's functions: scores, prompts, text

Each file imports only files above it in this list. Read clues.py first, or task.py for the interface of the task.
"""
