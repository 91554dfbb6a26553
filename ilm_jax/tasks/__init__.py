"""The tasks, each a module of sources and scores under one contract.

    tokenizer(cfg)                         ids and words
    source(cfg, split)                     random access to examples {'tokens': int32[n], 'fixed': bool[n]};
                                           split is 'train', 'validation' or 'test'; len() is the size of an epoch,
                                           and `endless` says that every index is a new example
    longest(cfg), longest_answer(cfg)      tokens of the longest example, and free tokens of the longest answer
    score(predicted, reference, cfg)       {name: (total, weight)} for one example, from its free tokens; missing where
                                           there is no right answer: what is measured is then the loss, and
                                           config.eval.metric must be one of its parts
    chance(cfg)                            exact match of an answer that has the right form and a random choice in it;
                                           goes with `score`
    landmark(tokens, cfg)                  (may be missing) index in the answer of a token whose place in the order of
                                           decoding is of interest, or None
    encode_prompt(text, cfg)               the given tokens of a prompt, [CLS] first
    decode(tokens, cfg)                    the text of a whole row

and, where a run must carry something with it (a tokenizer):

    settle(cfg, folder)                    find it, in the folder of the run (None: there is none) or by the config, and
                                           note in the config which it is
    carry(cfg, folder)                     write it into the folder of the run

`cfg` is the `task` part of a config. A new task is one file and one entry of TASKS.
"""

import importlib

from ilm_jax.types import UserError

TASKS = {"star": "ilm_jax.tasks.star", "zebra": "ilm_jax.tasks.zebra.task", "text": "ilm_jax.tasks.text.task"}


def get(name: str):
  """Return the module of a task."""
  if name not in TASKS:
    raise UserError(f'config.task.name={name!r}: expected one of {", ".join(TASKS)}')
  return importlib.import_module(TASKS[name])
