"""TinyStories: `--config=configs/tinystories.py:full|small`.

full    `python -m ilm_jax.main --config=configs/tinystories.py --workdir=runs/tinystories`: the paper's model (small,
        85M in the blocks), batch (512), learning rate and length (1,024 tokens), for a GPU or TPU. Its tokenizer is
        `--config.task.tokenizer.path=vocab.txt`, that of bert-base-uncased. Not run yet.
small   `python -m ilm_jax.main --config=configs/tinystories.py:small`: stories of up to 256 tokens, 1.9M parameters,
        batch 32, for 2 CPU cores. Run for 1,000 of its 5,000 steps on 14,000 stories (40 minutes on one shared core):
        at most 3.60 nats a token of held-out stories (README.md, docs/measured.md).

The stories (TinyStoriesV2-GPT4-train.txt and -valid.txt, 2.2 GB) are downloaded; `--config.data.path=PATH` reads those
of a file or folder instead.
"""

import ml_collections

from ilm_jax.configs import text


def get_config(name: str = 'full') -> ml_collections.ConfigDict:
  """Return the config of one of text.NAMES."""
  config = text.text_config('tinystories', name, length=1_024)
  config.task.source = 'tinystories'
  # Stories fill a fifth of their 1,024 tokens: everything fits, in 10,000 drawn steps (family=arm: 112 and 16 rows).
  if name == 'full':
    config.data.update({'batch_size': 512, 'rows': 64})
  else:
    config.data.rows = 10
  return config
