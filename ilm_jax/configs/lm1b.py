"""Config for the One Billion Word benchmark. Variants: full, small.

full    the paper's model (small, 85M parameters in the blocks), batch size (512), learning rate, length (128 tokens)
        and million steps, for a GPU or TPU. The paper uses the vocabulary of bert-base-uncased:
        `--config.task.tokenizer.path=vocab.txt`. Not yet trained.
small   1.9M parameters, batch 64, for two CPU cores: upper bound on the NLL of held-out sentences 5.85 nats per token
        after 1,000 of 5,000 steps on 11,600 sentences (9 minutes; docs/measured.md).

The corpus (1.8 GB) is downloaded; `--config.data.path=PATH` reads its archive, its shards (*.en-*-of-*) or *.tokens
files instead. Each line is a sentence, and is detokenized. Our rules join more tokens than those of earlier papers
(n't, %, $, both sides of quotes), so likelihoods per token are only roughly comparable with theirs.
"""

import ml_collections

from ilm_jax.configs import text

VARIANTS = {
  'full': "One Billion Word sentences, the paper's model (85M parameters)",
  'small': 'One Billion Word sentences, 1.9M parameters, for two CPU cores',
}


def get_config(name: str = 'full') -> ml_collections.ConfigDict:
  """Return the config of a variant, one of the keys of VARIANTS."""
  config = text.text_config('lm1b', name, length=128)
  config.task.update(source='lm1b', documents='line', detokenize=True, length=128)
  # These numbers of packed rows held all examples of 10,000 batches; family=arm needs 136 (variant full) or 26 (small).
  if name == 'full':
    config.steps = 1_000_000
    config.task.tokenizer.size = 30_000
    config.data.update({'batch_size': 512, 'rows': 80, 'row_length': 128, 'segments': 24})
  else:
    config.data.update({'batch_size': 64, 'rows': 16, 'row_length': 128, 'segments': 16})
  return config
