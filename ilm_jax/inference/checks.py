"""Checks of the arguments of the Python API: whole numbers, ids of requests, and the memory that sampling needs."""

import math
from collections.abc import Iterable

import numpy as np

from ilm_jax.distributed import memory
from ilm_jax.families import growing
from ilm_jax.types import UserError

SAMPLE_BYTES = 1_000  # lower bound on the memory of a sample's text, token strings and probabilities, in bytes


def is_whole(value, least: int, below: float = math.inf) -> bool:
  """Return whether a value is an integer, and least <= value < below."""
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < below


def check_whole(name: str, value, *, least: int) -> None:
  """Raise UserError unless the value of an argument is an integer of at least `least`."""
  if not is_whole(value, least):
    raise UserError(f'{name}={value!r}: expected a whole number, at least {least}')


def check_list(name: str, values, of: str) -> None:
  """Raise UserError if an argument that must be a list, such as one of prompts, is a single text or no list."""
  if isinstance(values, str) or not isinstance(values, Iterable):
    raise UserError(f'{name}: expected a list of {of}, got {values!r:.80}')


def check_ids(ids, count: int) -> None:
  """Raise UserError unless `ids` is a sequence of `count` integers from 0 to 2**31 - 1."""
  sequence = isinstance(ids, (list, tuple, range)) or (isinstance(ids, np.ndarray) and ids.ndim == 1)
  if not sequence or len(ids) != count or not all(is_whole(number, 0, 2**31) for number in ids):
    got = repr(list(ids[:8]) if sequence else ids)[:80]
    raise UserError(f'ids: expected a number from 0 to 2**31 - 1 for each of {count} requests, got {got}')


def check_memory(cfg, model_cfg, batch_size: int, num_devices: int) -> None:
  """Raise UserError if a lower bound on the memory of a batch of sampled rows exceeds the memory of the devices.

  A row has a token and its step for each position, two probabilities for each step, and, in the shortest buffer, at
  least 20 bytes of state and one activation of the transformer for each position.
  """
  positions = min(getattr(cfg, 'min_buffer', cfg.max_length), cfg.max_length)
  row = 8 * (cfg.max_length + growing.most_steps(cfg) + 1) + positions * (20 + 2 * model_cfg.d_model)
  needed, available = batch_size * row, num_devices * memory.device_memory()
  if needed > available:
    raise UserError(
      f'batch_size={batch_size} and sampling.max_length={cfg.max_length} need at least {memory.gigabytes(needed)} of '
      f'memory to decode, more than the {memory.gigabytes(available)} available: choose smaller values'
    )


def check_samples(count: int, setting: str) -> None:
  """Raise UserError if `count` samples exceed the memory of this host; `setting` names the setting to reduce."""
  if count * SAMPLE_BYTES > memory.host_memory():
    raise UserError(
      f'{setting}: {count} samples need at least {memory.gigabytes(count * SAMPLE_BYTES)} of memory, more than the '
      f'{memory.gigabytes(memory.host_memory())} of this host: choose a smaller number'
    )
