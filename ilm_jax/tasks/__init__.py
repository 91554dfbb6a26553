"""The tasks, each a module of sources and scores under one contract.

    tokenizer(cfg)                         ids and words
    source(cfg, split)                     random access to examples {'tokens': int32[n], 'fixed': bool[n]};
                                           split is 'train', 'validation' or 'test'; len() is the size of an epoch,
                                           and `endless` says that every index is a new example
    longest(cfg), longest_answer(cfg)      tokens of the longest example, and free tokens of the longest answer
    score(predicted, reference, cfg)       {name: (total, weight)} for one example, from its free tokens
    chance(cfg)                            exact match of an answer that has the right form and a random choice in it
    landmark(tokens, cfg)                  (may be missing) index in the answer of a token whose place in the order of
                                           decoding is of interest, or None
    encode_prompt(text, cfg)               the given tokens of a prompt, [CLS] first
    decode(tokens, cfg)                    the text of a whole row

`cfg` is the `task` part of a config. A new task is one file and one entry of TASKS.
"""

import importlib

from ilm_jax.types import UserError

TASKS = {'star': 'ilm_jax.tasks.star', 'zebra': 'ilm_jax.tasks.zebra'}


def get(name: str):
  """Return the module of a task."""
  if name not in TASKS:
    raise UserError(f'config.task.name={name!r}: expected one of {", ".join(TASKS)}')
  return importlib.import_module(TASKS[name])
