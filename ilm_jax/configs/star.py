"""Config for star graphs: find the path from source to goal. Variants: tiny, mini, easy, medium, hard.

tiny    0.86M parameters, batch 32: on two CPU cores, solves 99.5 to 99.9 % of 1,000 test graphs after 3,500 to 4,000
        steps, 4 minutes (3 seeds, docs/measured.md).
mini    Three arms of four nodes, otherwise as tiny: solves 93.9, 97.9 and 16.2 % of 1,000 test graphs after 6,000
        steps, all still rising (3 seeds, RESULTS.md; 11 minutes on an idle core).
easy, medium, hard
        The paper's task, model size (small, 85M parameters in the blocks), learning rate, batch size and 50,000 steps,
        for a GPU or TPU. hard, with --config.model.compute=bfloat16 on one H200: 98.67 % of 300 test graphs after 9,000
        steps, 3.5 minutes (seed 0). On two CPU cores, tiny's model solves easy in 26 minutes (docs/measured.md).
"""

import ml_collections

from ilm_jax.configs import default

VARIANTS = {
  'tiny': 'two arms of 4 nodes, 0.86M parameters: four minutes on two CPU cores',
  'mini': 'three arms of 4 nodes, 0.86M parameters',
  'easy': "three arms of 5 nodes, the paper's model (85M parameters)",
  'medium': "three arms of 3 to 6 nodes, the paper's model",
  'hard': "five arms of 6 to 12 nodes, the paper's model",
}
GRAPHS = {  # (arms, shortest arm, longest arm, minimum nodes after the junction, node names, maximum decoding steps)
  'tiny': (2, 4, 4, 0, 10, 6),
  'mini': (3, 4, 4, 0, 14, 6),
  'easy': (3, 5, 5, 0, 20, 8),
  'medium': (3, 3, 6, 2, 20, 10),
  'hard': (5, 6, 12, 5, 56, 200),
}
BATCH = {  # batch shapes with enough rows for all examples
  'easy': {'rows': 32, 'row_length': 72, 'segments': 2},
  'medium': {'rows': 20, 'row_length': 128, 'segments': 8},
  'hard': {'rows': 16, 'row_length': 512, 'segments': 8},
}


def get_config(name: str = 'tiny') -> ml_collections.ConfigDict:
  """Return the config of a variant, one of the keys of VARIANTS."""
  if name not in VARIANTS:
    raise ValueError(f'configs/star.py:{name}: expected one of {", ".join(VARIANTS)} after the colon')
  config = default.get_config()
  task = config.task = ml_collections.ConfigDict({'name': 'star', 'label': f'star {name}'})
  task.degree, task.min_length, task.max_length, task.min_plan, task.num_nodes, steps = GRAPHS[name]
  task.num_train = 50_000  # graphs per epoch; 0: never repeat a graph
  task.num_validation = 100
  task.num_test = 5_000
  task.seed = 0  # random seed for generating the graphs
  task.order = 'path'  # order of the answer's edges: path (from source to goal), or oracle (from goal to source)

  longest = 2 * task.degree * (task.max_length - 1) + 4 + 2 * (task.max_length - 1)
  config.sampling.max_length = config.corrupt.length = longest
  config.sampling.max_steps = steps

  if name in BATCH:
    config.data.update(BATCH[name])
    config.model.update({'final_norm': False, 'init': 'reference'})  # as in the reference implementation
  else:
    config.steps = 12_000
    config.stop_at = 0.995
    config.model.update(preset=None, num_layers=4, num_heads=4, d_model=128, d_ff=512, dropout=0, attention_dropout=0)
    config.model.init = 'reference'
    # With small batches, the loss leaves its initial plateau in less time than with large ones.
    config.data.update({'batch_size': 32, 'rows': 16, 'row_length': 2 * longest, 'segments': 2})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 100, 'b2': 0.99, 'ema_decay': 0.999})
    task.num_validation, task.num_test = 1_000, 1_000
    config.eval.every = config.checkpoint_every = 500
  return config
