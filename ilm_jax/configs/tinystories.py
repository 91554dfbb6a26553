"""Config for TinyStories. Variants: full, small.

full    the paper's model (small, 85M parameters in the blocks), batch size (512), learning rate and length (1,024
        tokens), for a GPU or TPU. The paper uses the vocabulary of bert-base-uncased:
        `--config.task.tokenizer.path=vocab.txt`. Not yet trained.
small   stories of up to 256 tokens, 1.9M parameters, batch 32, for two CPU cores: upper bound on the NLL of held-out
        stories 3.60 nats per token after 1,000 of 5,000 steps on 14,000 stories (40 minutes; docs/measured.md).

The stories (2.2 GB) are downloaded; `--config.data.path=PATH` reads a file or folder instead.
"""

import ml_collections

from ilm_jax.configs import text

VARIANTS = {
  'full': "stories of up to 1,024 tokens, the paper's model (85M parameters)",
  'small': 'stories of up to 256 tokens, 1.9M parameters, for two CPU cores',
}


def get_config(name: str = 'full') -> ml_collections.ConfigDict:
  """Return the config of a variant, one of the keys of VARIANTS."""
  config = text.text_config('tinystories', name, length=1_024)
  config.task.source = 'tinystories'
  # The average story has about 200 tokens. These numbers of packed rows held all examples of 10,000 batches; family=arm
  # needs 112 (variant full) or 16 (small).
  if name == 'full':
    config.data.update({'batch_size': 512, 'rows': 64})
  else:
    config.data.rows = 10
  return config
