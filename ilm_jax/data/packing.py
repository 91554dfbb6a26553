"""Packing: place corrupted examples of different lengths into the fixed-size rows of a batch. Pure NumPy."""

import dataclasses

import numpy as np

from ilm_jax.types import Batch, UserError

DTYPES = {  # name of an array in a batch (described in `ilm_jax.types`) -> dtype
  **dict.fromkeys(('tokens_BxL', 'segment_BxL', 'position_BxL'), np.int32),
  'open_BxL': bool,
  **dict.fromkeys(('target_gap_BxT', 'target_token_BxT', 'target_segment_BxT'), np.int32),
  'target_weight_BxT': np.float32,
  **dict.fromkeys(('cls_BxS', 'example_id_BxS', 'length_BxS', 'free_BxS'), np.int32),
  **dict.fromkeys(('segment_weight_BxS', 'noise_BxS'), np.float32),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Packing capacities: the number of rows, and how many tokens, targets and examples one row can hold."""

  rows: int
  length: int  # number of token positions per row
  targets: int  # maximum number of prediction targets per row
  segments: int  # maximum number of examples per row

  def empty(self) -> Batch:
    """Return a batch of this shape that holds only padding."""
    sizes = {'L': self.length, 'T': self.targets, 'S': self.segments}
    batch = {name: np.zeros((self.rows, sizes[name[-1]]), dtype) for name, dtype in DTYPES.items()}
    batch['example_id_BxS'].fill(-1)
    return batch


def assign_rows(sizes: list[tuple[int, int]], shape: Shape) -> list[int]:
  """Assign examples to rows by first-fit decreasing bin packing; return the row of each, or -1 if no row has room.

  `sizes` holds (number of tokens, number of targets) of each example. Examples are placed from the largest to the
  smallest, where the size of an example is the fraction of a row's positions plus the fraction of a row's targets that
  it needs. Each goes into the first row that has room for it.
  """
  room = [(shape.length, shape.targets, shape.segments)] * shape.rows
  rows = [-1] * len(sizes)
  # Size of each example, tokens / shape.length + targets / shape.targets, times both capacities to get an integer.
  share = [tokens * shape.targets + targets * shape.length for tokens, targets in sizes]
  for i in sorted(range(len(sizes)), key=lambda i: -share[i]):
    tokens, targets = sizes[i]
    for row, (tokens_left, targets_left, segments_left) in enumerate(room):
      if tokens <= tokens_left and targets <= targets_left and segments_left:
        room[row] = tokens_left - tokens, targets_left - targets, segments_left - 1
        rows[i] = row
        break
  return rows


def pack(examples: list[dict], ids: list[int], shape: Shape) -> Batch:
  """Pack corrupted examples (see `families.corruption`) into the rows of a batch.

  The integer ids of the examples are stored in `example_id_BxS`. An example that fits into no row is left out, so its
  id does not appear there.
  """
  batch = shape.empty()
  filled = [(0, 0, 0)] * shape.rows  # (positions, targets, segments) already used in each row
  rows = assign_rows([(len(e['tokens']), len(e['target_token'])) for e in examples], shape)
  for example, index, row in zip(examples, ids, rows, strict=True):
    if row < 0:
      continue
    start, target, segment = filled[row]
    end, target_end = start + len(example['tokens']), target + len(example['target_token'])
    batch['tokens_BxL'][row, start:end] = example['tokens']
    batch['segment_BxL'][row, start:end] = segment + 1
    batch['position_BxL'][row, start:end] = np.arange(end - start)
    batch['open_BxL'][row, start:end] = example['open']
    batch['target_gap_BxT'][row, target:target_end] = example['target_gap'] + start
    batch['target_token_BxT'][row, target:target_end] = example['target_token']
    batch['target_segment_BxT'][row, target:target_end] = segment + 1
    batch['target_weight_BxT'][row, target:target_end] = example.get('target_weight', 1.0)
    batch['cls_BxS'][row, segment] = start
    batch['segment_weight_BxS'][row, segment] = 1.0
    batch['example_id_BxS'][row, segment] = index
    batch['length_BxS'][row, segment] = example['length']
    batch['free_BxS'][row, segment] = example.get('free', 0)
    batch['noise_BxS'][row, segment] = example.get('noise', 0.0)
    filled[row] = end, target_end, segment + 1
  return batch


def concatenate(batches: list[Batch]) -> Batch:
  """Concatenate batches along the row axis."""
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def shape_of(data, groups: int | None = None) -> Shape:
  """Return the shape of a group (a separately packed part of a batch), from the `data` section of a config.

  `groups` is the number of groups per batch, by default `data.groups`; 1 gives the shape of a whole batch. Raises
  UserError if `data.batch_size` or `data.rows` is not a multiple of it.
  """
  groups = data.groups if groups is None else groups
  for name, total in (('batch_size', data.batch_size), ('rows', data.rows)):
    if total % groups:
      multiples = nearest_multiples(total, groups)
      raise UserError(f'data.{name}={total} is not a multiple of data.groups={groups}: use data.{name}={multiples}')
  targets = data.targets or 2 * data.row_length
  return Shape(data.rows // groups, data.row_length, targets, data.segments)


def nearest_multiples(value: int, divisor: int) -> str:
  """Return the multiples of `divisor` just below and above `value`, as text for an error message ("16 or 20")."""
  below = value // divisor * divisor
  return f'{below} or {below + divisor}' if below else str(divisor)
