"""Zebra puzzles: `--config=configs/zebra.py:small|full`.

small   `python -m ilm_jax.main --config=configs/zebra.py:small`: 3 to 4 houses and attributes, 2.0M parameters, batch
        64, for 2 CPU cores. Its 21,200 puzzles take about a minute to generate, once (data/). Not run yet.
full    `python -m ilm_jax.main --config=configs/zebra.py:full --workdir=runs/zebra`: the paper's task, model (tiny2,
        43M in the blocks), learning rate, batch and loss: 3 to 6 houses and attributes, for a GPU or TPU. The paper's
        300 epochs over 1.5M puzzles are 1.76M steps, `steps` is 200,000 here. Generating 1.5M puzzles takes about 4
        hours on one core, less with `--config.task.num_workers`; `--config.task.path=FOLDER` reads the released ones
        instead. Not run yet.

`--config.task.order=sorted` sorts the cells of an answer instead of listing them in the order of solving.
"""

import ml_collections

from ilm_jax.configs import default

NAMES = ('small', 'full')


def get_config(name: str = 'small') -> ml_collections.ConfigDict:
  """Return the config of one of NAMES."""
  if name not in NAMES:
    raise ValueError(f'configs/zebra.py:{name}: expected one of {", ".join(NAMES)} behind the colon')
  full = name == 'full'
  config = default.get_config()
  task = config.task = ml_collections.ConfigDict({'name': 'zebra', 'label': 'zebra' if full else f'zebra {name}'})
  task.min_houses = task.min_attributes = 3
  task.max_houses = task.max_attributes = 6 if full else 4
  task.order = 'solver'  # or sorted: the cells of an answer
  task.num_train = 1_500_000 if full else 20_000  # 0: endless without a cache, all of the released ones with a path
  task.num_validation = 640 if full else 200
  task.num_test = 5_000 if full else 1_000
  task.seed = 0  # of the puzzles
  task.num_workers = 0  # processes that generate; 0: this one
  task.cache = 'data'  # folder for the puzzles, once generated; '': generate when needed, and keep in memory
  task.path = ''  # the released puzzles: a folder with both files, or one file

  config.loss.stop_weight = 0.001
  config.model.update({'final_norm': False, 'init': 'reference'})  # as the reference
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 1_000
  # Rows are sized so that everything fits: in 10,000 drawn steps nothing was left out.
  config.corrupt.length = 460 if full else 240  # of the padded strings of mdm
  if full:
    config.steps = 200_000
    config.model.preset = 'tiny2'
    config.sampling.max_length = config.sampling.max_steps = 460
    config.data.update({'batch_size': 256, 'rows': 112, 'row_length': 512, 'segments': 8})
    config.eval.every = config.checkpoint_every = 5_000
    config.eval.batch_size = 128
  else:
    config.steps = 20_000
    config.model.update({'preset': None, 'num_layers': 4, 'num_heads': 4, 'd_model': 192, 'd_ff': 768})
    config.model.dropout = config.model.attention_dropout = 0.0
    config.sampling.max_length, config.sampling.max_steps = 240, 48
    config.data.update({'batch_size': 64, 'rows': 30, 'row_length': 256, 'segments': 4})
  return config
