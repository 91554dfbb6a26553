"""Config for zebra puzzles: deduce a table from clues. Variants: small, full.

small   3 to 4 houses and attributes, 2.0M parameters, batch 64, for two CPU cores. Generates 21,200 puzzles once, in
        about a minute, and stores them in data/. Not yet trained.
full    the paper's task (3 to 6 houses and attributes), model (tiny2, 43M parameters in the blocks), learning rate,
        batch size and loss, for a GPU or TPU. The paper trains for 300 epochs over 1.5M puzzles, 1.76M steps; `steps`
        is 200,000 here. Generating 1.5M puzzles takes about 4 hours on one core, less with
        `--config.task.num_workers`; `--config.task.path=FOLDER` reads the released puzzles instead. Not yet trained.
"""

import ml_collections

from ilm_jax.configs import default

VARIANTS = {
  'small': '3 to 4 houses and attributes, 2.0M parameters',
  'full': "the paper's puzzles and model (43M parameters): 3 to 6 houses and attributes",
}


def get_config(name: str = 'small') -> ml_collections.ConfigDict:
  """Return the config of a variant, one of the keys of VARIANTS."""
  if name not in VARIANTS:
    raise ValueError(f'configs/zebra.py:{name}: expected one of {", ".join(VARIANTS)} after the colon')
  full = name == 'full'
  config = default.get_config()
  task = config.task = ml_collections.ConfigDict({'name': 'zebra', 'label': 'zebra' if full else f'zebra {name}'})
  task.min_houses = task.min_attributes = 3
  task.max_houses = task.max_attributes = 6 if full else 4
  task.order = 'solver'  # order of the answer's cells: solver (as a solver deduces them) or sorted
  task.num_train = 1_500_000 if full else 20_000  # training puzzles; 0: all in `path`, or endlessly many if it is empty
  task.num_validation = 640 if full else 200
  task.num_test = 5_000 if full else 1_000
  task.seed = 0  # random seed for generating the puzzles
  task.num_workers = 0  # worker processes that generate puzzles; 0: generate in this process
  task.cache = 'data'  # folder for generated puzzles; '': generate on demand, and keep in memory
  task.path = ''  # released puzzles to read: folder with the train and test files, or one file

  config.loss.stop_weight = 0.001
  config.model.update({'final_norm': False, 'init': 'reference'})  # as in the reference implementation
  config.optimizer.update(learning_rate=1e-3, warmup_steps=1_000)
  # The numbers of packed rows set below (data.rows) held all examples of 10,000 batches.
  config.corrupt.length = 460 if full else 240  # MDM: length to which examples are padded
  if full:
    config.steps = 200_000
    config.model.preset = 'tiny2'
    config.sampling.max_length = config.sampling.max_steps = 460
    config.data.update({'batch_size': 256, 'rows': 112, 'row_length': 512, 'segments': 8})
    config.eval.every = config.checkpoint_every = 5_000
    config.eval.batch_size = 128
  else:
    config.steps = 20_000
    config.model.update(preset=None, num_layers=4, num_heads=4, d_model=192, d_ff=768, dropout=0, attention_dropout=0)
    config.sampling.max_length, config.sampling.max_steps = 240, 48
    config.data.update({'batch_size': 64, 'rows': 30, 'row_length': 256, 'segments': 4})
  return config
