"""Batches as a pure function of (seed, step): corrupt each example, pack the examples of a group into rows (grain).

A step takes `batch_size` examples, cut into `groups`; a group is packed by itself into `rows / groups` rows, so that a
host, which reads whole groups, gets the same rows whatever the number of hosts. Randomness is
`np.random.default_rng((seed, stream, index of the example))`; epochs are permuted by a keyed bijection, so nothing has
to be saved but the step.
"""

import dataclasses
import math
import multiprocessing
import signal
import sys
import threading
from typing import Any

import grain
import numpy as np
from absl import flags

from ilm_jax.types import Batch, UserError

STREAMS = {'train': 0, 'validation': 1}


# --- packing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
  """The fixed shape of the packed rows of a group."""

  rows: int
  length: int  # positions of a row
  targets: int  # dropped tokens of a row
  segments: int  # examples of a row

  def empty(self) -> Batch:
    """A batch of padding."""
    lengths, targets, segments = (self.rows, self.length), (self.rows, self.targets), (self.rows, self.segments)
    return {
      'tokens_BxL': np.zeros(lengths, np.int32),
      'segment_BxL': np.zeros(lengths, np.int32),
      'position_BxL': np.zeros(lengths, np.int32),
      'open_BxL': np.zeros(lengths, bool),
      'target_gap_BxT': np.zeros(targets, np.int32),
      'target_token_BxT': np.zeros(targets, np.int32),
      'target_segment_BxT': np.zeros(targets, np.int32),
      'target_weight_BxT': np.zeros(targets, np.float32),
      'cls_BxS': np.zeros(segments, np.int32),
      'segment_weight_BxS': np.zeros(segments, np.float32),
      'example_id_BxS': np.full(segments, -1, np.int32),
      'length_BxS': np.zeros(segments, np.int32),
      'free_BxS': np.zeros(segments, np.int32),
      'noise_BxS': np.zeros(segments, np.float32),
    }


def place(sizes: list[tuple[int, int]], shape: Shape) -> list[int]:
  """Choose a row for each (tokens, targets) size, each the first with room; -1 = no room.

  The largest come first, by the share of a row's tokens and targets that they take together.
  """
  room = [(shape.length, shape.targets, shape.segments)] * shape.rows
  chosen = [-1] * len(sizes)
  share = [tokens * shape.targets + targets * shape.length for tokens, targets in sizes]
  for i in sorted(range(len(sizes)), key=lambda i: -share[i]):
    tokens, targets = sizes[i]
    for row, (tokens_left, targets_left, segments_left) in enumerate(room):
      if tokens <= tokens_left and targets <= targets_left and segments_left:
        room[row] = tokens_left - tokens, targets_left - targets, segments_left - 1
        chosen[i] = row
        break
  return chosen


def pack(examples: list[dict], ids: list[int], shape: Shape) -> Batch:
  """Lay corrupted examples out in rows. One that fits nowhere is left out: its id is missing from `example_id_BxS`."""
  batch = shape.empty()
  filled = [(0, 0, 0)] * shape.rows
  chosen = place([(len(e['tokens']), len(e['target_token'])) for e in examples], shape)
  for example, index, row in zip(examples, ids, chosen, strict=True):
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


# --- which example, with which randomness -----------------------------------------------------------------------------


def permute(index: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
  """A pseudo-random bijection of range(size) (a Feistel network, walked until it falls into the range): O(1) memory."""
  half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
  keys = np.random.default_rng(seed).integers(0, 2**63, size=6, dtype=np.uint64)
  mask = np.uint64(2**half - 1)

  def rounds(x):
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
      word = (right + key) * np.uint64(0x9E3779B97F4A7C15)
      left, right = (
        right,
        left ^ ((word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32) & mask),
      )
    return (left << np.uint64(half)) | right

  with np.errstate(over='ignore'):
    out = rounds(index.astype(np.uint64))
    while (outside := out >= size).any():
      out[outside] = rounds(out[outside])
  return out.astype(np.int64)


def epoch_order(global_index: np.ndarray, size: int, seed: int) -> np.ndarray:
  """The example behind each global index: every epoch is another permutation of the source."""
  epoch, within = np.divmod(global_index, size)
  out = np.empty_like(within)
  for e in np.unique(epoch):
    out[epoch == e] = permute(within[epoch == e], size, (seed, 0x45504F43, int(e)))
  return out


def example_rng(seed: int, stream: str, index: int) -> np.random.Generator:
  """The generator of one example's corruption."""
  return np.random.default_rng((seed, STREAMS[stream], index))


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packed:
  """Everything a worker needs to make the rows of a step; a plain, picklable map for grain."""

  source: Any
  corrupt: Any  # (rng, example, cfg, u) -> corrupted example
  corrupt_cfg: Any
  seed: int
  batch_size: int
  groups: int
  shape: Shape  # of one group
  my_groups: tuple[int, int]  # this host's, first and one past the last

  def __reduce__(self):
    return _unpickle, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def __call__(self, step: int) -> Batch:
    """The rows of this host at a step (0, 1, ...)."""
    return concatenate([self.group(int(step), g) for g in range(*self.my_groups)])

  def group(self, step: int, group: int) -> Batch:
    """The rows of one group of a step."""
    size = self.batch_size // self.groups
    ids = (step * self.groups + group) * size + np.arange(size, dtype=np.int64)
    where = ids if self.source.endless else epoch_order(ids, len(self.source), self.seed)
    examples = [
      self.corrupt(example_rng(self.seed, 'train', int(i)), self.source[int(at)], self.corrupt_cfg)
      for i, at in zip(ids, where, strict=True)
    ]
    return pack(examples, (ids % 2**31).tolist(), self.shape)


def _unpickle(*fields) -> Packed:
  """Make a Packed; a worker process leaves Ctrl-C, which a terminal sends to all, to its parent."""
  if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  return Packed(*fields)


def concatenate(batches: list[Batch]) -> Batch:
  """Stack the rows of several batches."""
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def shape_of(data, groups: int | None = None) -> Shape:
  """The rows of one group, from a config's `data` part; refuses what doesn't divide.

  Args:
    data: the part.
    groups: to use instead of the config's; 1 for the rows of a whole batch.
  """
  groups = data.groups if groups is None else groups
  for name, total in (('batch_size', data.batch_size), ('rows', data.rows)):
    if total % groups:
      fits = nearest(total, groups)
      raise UserError(f'data.{name}={total} is not a multiple of data.groups={groups}: use data.{name}={fits}')
  targets = data.targets or 2 * data.row_length
  return Shape(data.rows // groups, data.row_length, targets, data.segments)


def nearest(value: int, divisor: int) -> str:
  """The multiples of divisor around value, as text."""
  below = value // divisor * divisor
  return f'{below} or {below + divisor}' if below else str(divisor)


def my_groups(groups: int, host: int, hosts: int) -> tuple[int, int]:
  """The groups that a host reads."""
  if groups % hosts:
    fits = [g for g in range(1, 4 * hosts * groups) if g % hosts == 0]
    best = sorted(fits, key=lambda g: abs(g - groups))[0]
    raise UserError(f'data.groups={groups} does not divide over {hosts} hosts: use data.groups={best}')
  share = groups // hosts
  return host * share, (host + 1) * share


def train_batches(source, corrupt, cfg, *, start: int, stop: int, part: tuple[int, int] = (0, 1)):
  """Iterate over this host's batches of steps start, ..., stop - 1, read ahead by a thread or by worker processes.

  Args:
    source: of the training split.
    corrupt: of the family.
    cfg: the whole config (`seed`, `data`, `corrupt`).
    start: first step.
    stop: one past the last.
    part: (index, number) of the equal parts of each batch, whole groups, one of which this host reads.
  """
  data = cfg.data
  make = Packed(
    source=source,
    corrupt=corrupt,
    corrupt_cfg=cfg.corrupt,
    seed=cfg.seed,
    batch_size=data.batch_size,
    groups=data.groups,
    shape=shape_of(data),
    my_groups=my_groups(data.groups, *part),
  )
  dataset = grain.MapDataset.range(start, stop).map(make)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
  if data.num_workers:
    flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
    sys.warnoptions.append('ignore:resource_tracker:UserWarning')  # which frees what grain shared when a run is cut off
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.num_workers))
  return iter(dataset)


def validation_batches(source, corrupt, cfg):
  """Yield packed batches of a fixed corruption of each example, its size n stratified over the examples.

  Always the same rows: the loss of one step can be compared with that of another. Rows that are not filled have
  weight 0.
  """
  count = len(source)
  quantile = (permute(np.arange(count), count, (0, 0x53545241)) + 0.5) / count
  shape = dataclasses.replace(shape_of(cfg.data), rows=cfg.data.rows)
  size = cfg.data.batch_size
  for first in range(0, count, size):
    ids = list(range(first, min(first + size, count)))
    examples = [corrupt(example_rng(0, 'validation', i), source[i], cfg.corrupt, u=quantile[i]) for i in ids]
    while ids:
      batch = pack(examples, ids, shape)
      placed = set(batch['example_id_BxS'].ravel().tolist())
      if placed == {-1}:
        raise UserError(
          f'a validation example of {examples[0]["length"]} tokens fits in no row: raise data.row_length='
          f'{shape.length} or data.targets={shape.targets}'
        )
      yield batch
      left = [(i, e) for i, e in zip(ids, examples, strict=True) if i not in placed]
      ids, examples = [i for i, _ in left], [e for _, e in left]
