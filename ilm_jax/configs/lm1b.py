"""One Billion Word benchmark: `--config=configs/lm1b.py:full|small`.

full    `python -m ilm_jax.main --config=configs/lm1b.py --workdir=runs/lm1b`: the paper's model (small, 85M in the
        blocks), batch (512), learning rate, length (128 tokens) and million steps, for a GPU or TPU. Its tokenizer is
        `--config.task.tokenizer.path=vocab.txt`, that of bert-base-uncased. Not run yet.
small   `python -m ilm_jax.main --config=configs/lm1b.py:small`: 1.9M parameters, batch 64, for 2 CPU cores. Run for
        1,000 of its 5,000 steps on 11,600 sentences (9 minutes on two cores): at most 5.85 nats a token of held-out
        sentences (README.md, docs/measured.md).

The corpus (1.8 GB) is downloaded; `--config.data.path=PATH` reads its archive, its shards (*.en-*-of-*) or *.tokens
instead. A sentence is a line, and is detokenised, by rules that join more than those of earlier papers do (n't, %, $,
the two sides of quotes), so that numbers per token can be compared with theirs only roughly.
"""

import ml_collections

from ilm_jax.configs import text


def get_config(name: str = 'full') -> ml_collections.ConfigDict:
  """Return the config of one of text.NAMES."""
  config = text.text_config('lm1b', name, length=128)
  config.task.source = 'lm1b'
  config.task.documents = 'line'
  config.task.detokenize = True
  config.task.length = 128
  # Everything fits, in 10,000 drawn steps (family=arm: 136 and 26 rows).
  if name == 'full':
    config.steps = 1_000_000
    config.task.tokenizer.size = 30_000
    config.data.update({'batch_size': 512, 'rows': 80, 'row_length': 128, 'segments': 24})
  else:
    config.data.update({'batch_size': 64, 'rows': 16, 'row_length': 128, 'segments': 16})
  return config
