"""Check the settings of a config before anything is computed: names, ranges, choices, and the memory that they need."""

import difflib
import importlib
import math

import jax

from ilm_jax.configs import default
from ilm_jax.data.pipeline import shape_of
from ilm_jax.distributed import memory, sharding
from ilm_jax.families import FAMILIES
from ilm_jax.families.settings import KNOWN
from ilm_jax.runs.run_file import RENAMED, as_json, flatten
from ilm_jax.tasks import TASKS
from ilm_jax.types import UserError, check_seed

# (description, predicate, names of settings); the ranges of the sampler's settings are in families.settings.
RANGES = (
  ('a finite number', math.isfinite, ('stop_at',)),
  ('at least 0', lambda x: x >= 0, (
    'log_every', 'checkpoint_every', 'report_seconds', 'loss.stop_weight',
    'corrupt.length', 'corrupt.eos_weight', 'data.targets', 'optimizer.learning_rate', 'optimizer.warmup_steps',
    'optimizer.eps', 'optimizer.weight_decay', 'optimizer.clip', 'eval.every', 'eval.samples', 'eval.print_samples',
  )),
  ('at least 1', lambda x: x >= 1, (
    'steps', 'keep', 'loss.vocab_chunk', 'data.batch_size', 'data.groups',
    'data.rows', 'data.segments', 'data.prefetch', 'optimizer.accumulation_steps', 'eval.batch_size',
    'distributed.initialization_timeout', 'model.num_layers', 'model.num_heads', 'model.d_model', 'model.d_ff',
    'model.d_cond',
  )),
  ('a whole number from 1 to 1,000,000', lambda x: 1 <= x <= 1_000_000, ('task.num_validation', 'task.num_test')),
  ('at least 0 and below 2**62', lambda x: 0 <= x < 2**62, ('task.num_train',)),
  ('at least 2', lambda x: x >= 2, ('data.row_length',)),
  ('at least 5', lambda x: x >= 5, ('distributed.heartbeat_timeout',)),
  ('-1 or at least 1', lambda x: x == -1 or x >= 1, ('mesh.data', 'mesh.fsdp', 'mesh.tensor')),
  ('a whole number from 0 to 1024', lambda x: 0 <= x <= 1024, ('data.num_workers', 'task.num_workers')),
  ('a number from 0 to 1', lambda x: 0 <= x <= 1, (
    'corrupt.infill_rate', 'corrupt.fim_rate', 'corrupt.noise_eps', 'optimizer.final_fraction',
  )),
  ('a number of at least 0 and below 1', lambda x: 0 <= x < 1, (
    'model.dropout', 'model.attention_dropout', 'optimizer.b1', 'optimizer.b2', 'optimizer.ema_decay',
  )),
)  # fmt: skip
MAY_BE_INFINITE = ('optimizer.clip', 'report_seconds')
LIMITED_BY_MEMORY = ('data.batch_size',)  # whole numbers that may be 2**31 or more if the memory suffices
CHOICES = {
  'optimizer.schedule': ('constant', 'cosine', 'linear'),
  'loss.length_weight': ('none', 'elbo'),
  'eval.mode': ('max', 'min'),
}
# Valid settings that `configs.default` does not define.
OPTIONAL = ('data.path', 'eval.perplexity_model', 'model.rotary_dim', *[f'sampling.{name}' for name in KNOWN])
MAY_BE_PARTIAL = ('corrupt', 'distributed', 'model', 'sampling')  # sections in which settings may be missing
FAMILY_SECTIONS = ('corrupt', 'loss', 'model', 'sampling')  # a family outside this package may add settings to these


def check_settings(cfg) -> None:
  """Raise UserError if a setting of the config is unknown or missing, or if its value is not allowed."""
  values = flatten(as_json(cfg))
  check_names(cfg, values.keys())
  for name, value in values.items():
    if is_seed := name.split('.')[-1] == 'seed':
      check_seed(value, name)
    infinite = value == math.inf and name in MAY_BE_INFINITE
    if isinstance(value, float) and not math.isfinite(value) and not infinite:
      raise UserError(f'{name}={value}: expected a finite number')
    unlimited = is_seed or name.startswith('task.') or name in LIMITED_BY_MEMORY
    if isinstance(value, int) and abs(value) >= 2**31 and not unlimited:
      raise UserError(f'{name}={value}: expected a number below 2**31')
  for allowed, test, names in RANGES:
    for name in names:
      value = values.get(name)
      if value is not None and (isinstance(value, str) or not test(value)):
        raise UserError(f'{name}={value!r}: expected {allowed}')
  for name, allowed in CHOICES.items():
    if values[name] not in allowed:
      raise UserError(f'{name}={values[name]!r}: expected one of {", ".join(allowed)}')
  which = str(values['eval.checkpoint'])
  if which not in ('best', 'latest') and not which.isdecimal():
    raise UserError(f"eval.checkpoint={which!r}: expected 'best', 'latest' or a step")


def check_names(cfg, names) -> None:
  """Raise UserError if a setting does not exist, such as `config.stpes`, or if a required setting is missing.

  Tasks outside this package may have any settings below `task`; families outside it, any in FAMILY_SECTIONS and any new
  section.
  """
  for name in names & RENAMED.keys():
    raise UserError(f'config.{name} was renamed: set config.{RENAMED[name]} instead')
  if 'task.name' not in names:
    raise UserError(f'config.task.name is missing: expected one of {", ".join(TASKS)}, or the import path of a module')
  required = flatten(as_json(default.get_config())).keys()
  known = {*required, *OPTIONAL}
  if cfg.task.name in TASKS:
    known |= flatten(as_json(importlib.import_module(f'ilm_jax.configs.{cfg.task.name}').get_config())).keys()
  else:
    known |= {name for name in names if name.startswith('task.')}
  if cfg.get('family') not in FAMILIES:
    closed = {name.split('.')[0] for name in known} - set(FAMILY_SECTIONS)
    known |= {name for name in names if '.' in name and name.split('.')[0] not in closed}
  for name in sorted(names - known):
    section = name.rpartition('.')[0]
    close = difflib.get_close_matches(name, known, n=1)
    siblings = sorted(other for other in known if other.rpartition('.')[0] == section) or sorted(required)
    hint = f'did you mean config.{close[0]}?' if close else f'expected one of {", ".join(siblings)}'
    raise UserError(f'config.{name} is not a setting: {hint}')
  for name in sorted(name for name in required - names if name.split('.')[0] not in MAY_BE_PARTIAL):
    raise UserError(f'config.{name} is missing: start from ilm_jax.configs.default.get_config(), which has it')


def check_memory(exp, training: bool) -> None:
  """Raise UserError if a lower bound on the memory that a run needs exceeds that of its devices or of this host."""
  cfg, model, data, sampling = exp.cfg, exp.model_cfg, exp.cfg.data, exp.sample_cfg
  width, shape, shards = model.d_model, shape_of(data, groups=1), sharding.num_row_shards(exp.mesh)
  weights = model.num_layers * (4 * width + 2 * model.d_ff) * width + 2 * model.vocab_size * width
  copies = 4 + bool(cfg.optimizer.ema_decay) if training else 1  # weights, gradients, two moments, moving average
  block_bytes = shape.length * width * (4 if model.compute == 'float32' else 2)  # bytes of a block's input per row
  batch_bytes = shape.rows * (13 * shape.length + 16 * shape.targets + 24 * shape.segments)
  decoded = cfg.eval.batch_size * max(sampling.max_length, sampling.max_steps or 0)
  device = {  # settings on which a part of the memory depends -> bytes of this part on each device
    f'model.num_layers={model.num_layers}, d_model={width}, d_ff={model.d_ff}':
      4 * copies * weights / exp.mesh.shape['fsdp'] / exp.mesh.shape['tensor'],
    f'data.rows={shape.rows}, row_length={shape.length}':
      training * shape.rows * model.num_layers * block_bytes / cfg.optimizer.accumulation_steps / shards,
    f'eval.batch_size={cfg.eval.batch_size}, sampling.max_length={sampling.max_length}, max_steps={sampling.max_steps}':
      16 * decoded / shards,
  }  # fmt: skip
  sizes = {name: data[name] for name in ('prefetch', 'rows', 'row_length', 'targets', 'segments')}
  one, other = sorted(sizes, key=sizes.get, reverse=True)[:2]  # those that are most likely too large
  host = {  # settings on which a part of the memory depends -> bytes of this part on each host
    f'data.batch_size={data.batch_size}': training * 500 * data.batch_size / jax.process_count(),
    f'data.{one}={sizes[one]}, data.{other}={sizes[other]}':
      training * min(data.prefetch, cfg.steps) * batch_bytes / jax.process_count(),
  }  # fmt: skip
  first = jax.local_devices()[0]
  limit = (first.memory_stats() or {}).get('bytes_limit')
  if not limit:  # CPU devices share the memory of the host
    host |= {name: size * jax.local_device_count() for name, size in device.items()}
  for where, parts, available in (
    (f'each device ({first.device_kind})', device, limit or math.inf), ('this host', host, memory.host_memory())
  ):  # fmt: skip
    if (total := sum(parts.values())) > available:
      raise UserError(
        f'{max(parts, key=parts.get)}: the run needs at least {memory.gigabytes(total)} of memory on {where}, which '
        f'has {memory.gigabytes(available)}: choose smaller values'
      )
