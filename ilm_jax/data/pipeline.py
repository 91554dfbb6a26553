"""The input pipeline (grain): batches as a pure function of (seed, step).

Each training step draws `batch_size` examples, corrupts them and splits them into `groups` groups. Each group is packed
separately into `rows / groups` rows. A process reads whole groups, so a step has the same rows for any number of
processes.

Each example is corrupted with its own generator, `np.random.default_rng((seed, stream, example index))`. Each epoch
visits the examples in a different pseudo-random order, derived from the seed and the epoch. To resume a run, the
pipeline therefore needs only the step number.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import signal
import sys
import threading
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from ilm_jax.data import storage
from ilm_jax.data.packing import Shape, assign_rows, concatenate, nearest_multiples, pack, shape_of  # noqa: F401 (re-exported)
from ilm_jax.types import Batch, UserError

BATCHES_PER_WORKER = 4  # maximum number of finished batches per worker process that wait in shared memory
STREAMS = {'train': 0, 'validation': 1}  # part of the seed, so that training and validation use different randomness


def permute(index: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
  """Apply the pseudo-random permutation of range(size) that `seed` selects to an array of indices, in O(1) memory.

  The permutation is a Feistel network on enough bits for `size`, rounded up to an even number. Outputs that are not
  below `size` are fed through the network again until they are (cycle walking).
  """
  half = max(1, math.ceil(math.log2(max(size, 2)) / 2))  # number of bits in each half of a Feistel block
  keys = np.random.default_rng(seed).integers(0, 2**63, size=6, dtype=np.uint64)
  mask = np.uint64(2**half - 1)

  def rounds(x):
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
      word = (right + key) * np.uint64(0x9E3779B97F4A7C15)
      word = (word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
      left, right = right, left ^ (word >> np.uint64(32) & mask)
    return (left << np.uint64(half)) | right

  with np.errstate(over='ignore'):
    out = rounds(index.astype(np.uint64))
    while (outside := out >= size).any():
      out[outside] = rounds(out[outside])
  return out.astype(np.int64)


def epoch_order(global_index: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Map global example indices (0, 1, ... over all epochs) to source indices; each epoch has its own permutation."""
  epoch, within = np.divmod(global_index, size)
  out = np.empty_like(within)
  for e in np.unique(epoch):
    out[epoch == e] = permute(within[epoch == e], size, (seed, 0x45504F43, int(e)))  # the constant is "EPOC" in ASCII
  return out


def example_rng(seed: int, stream: str, index: int) -> np.random.Generator:
  """Return the random generator for the corruption of example `index` of a stream ('train' or 'validation')."""
  return np.random.default_rng((seed, STREAMS[stream], index))


@dataclasses.dataclass(frozen=True)
class Packed:
  """A picklable function from a step number to this process's packed rows of that step; grain maps it over steps."""

  source: Any  # the training examples, with random access (a `tasks.contract.Source`)
  corrupt: Any  # function (rng, example, cfg) -> corrupted example
  cfg: Any  # the whole config
  shape: Shape  # size of a group, a separately packed part of each batch
  groups_of_process: tuple[int, int]  # half-open range of the groups of each step that this process reads

  def __reduce__(self):
    return _unpickle, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def __call__(self, step: int) -> Batch:
    """Return this process's packed rows of one training step (0, 1, ...)."""
    return concatenate([self.group(int(step), g) for g in range(*self.groups_of_process)])

  def group(self, step: int, group: int) -> Batch:
    """Return the packed rows of one group, a separately packed part of a step's batch."""
    seed, groups, corrupt_cfg = self.cfg.seed, self.cfg.data.groups, self.cfg.corrupt
    size = self.cfg.data.batch_size // groups
    ids = (step * groups + group) * size + np.arange(size, dtype=np.int64)
    where = ids if self.source.endless else epoch_order(ids, len(self.source), seed)
    examples = [
      self.corrupt(example_rng(seed, 'train', int(i)), self.source[int(at)], corrupt_cfg)
      for i, at in zip(ids, where, strict=True)
    ]
    return pack(examples, (ids % 2**31).tolist(), self.shape)


def _unpickle(*fields) -> Packed:
  """Rebuild a `Packed` from its fields; in a worker process, also ignore Ctrl-C, which the parent process handles."""
  if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  return Packed(*fields)


def groups_of_process(groups: int, process: int, processes: int) -> tuple[int, int]:
  """Return the half-open range of the groups of a step that process number `process` reads.

  Raises UserError if the number of groups is not a multiple of the number of processes.
  """
  if groups % processes:
    best = min(range(processes, 4 * processes * groups, processes), key=lambda g: abs(g - groups))
    raise UserError(f'data.groups={groups} cannot be divided evenly over {processes} processes: use data.groups={best}')
  share = groups // processes
  return process * share, (process + 1) * share


def train_batches(source, corrupt, cfg, *, start: int, stop: int, part: tuple[int, int] = (0, 1)):
  """Return an iterator over this process's training batches of steps `start` to `stop - 1`.

  `source` gives random access to the training split, `corrupt` maps (rng, example, cfg) to a corrupted example, and
  `cfg` is the whole config. `part` = (index, count) selects one of `count` equal parts of each batch, which consist of
  whole groups. A background thread prefetches the batches, or `data.num_workers` worker processes make them. Raises
  UserError if the batch does not divide into groups, or the groups into parts.
  """
  data = cfg.data
  make = Packed(source, corrupt, cfg, shape_of(data), groups_of_process(data.groups, *part))
  dataset = grain.MapDataset.range(start, stop).map(make)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
  if data.num_workers:
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags and fail if those are unparsed
    # Hide a harmless warning that Python prints when it frees grain's shared memory after an interruption.
    sys.warnoptions.append('ignore:resource_tracker:UserWarning')
    batch_size = sum(array.nbytes for array in make.shape.empty().values()) * len(range(*make.groups_of_process))
    needed = batch_size * data.num_workers * BATCHES_PER_WORKER
    if (free := storage.free_shared_memory('data.num_workers', data.num_workers)) < needed:
      logging.warning('/dev/shm has %d MB of free shared memory, less than the %d MB that data.num_workers=%d needs: '
                      'batches are sent through slower pipes', free >> 20, needed >> 20, data.num_workers)  # fmt: skip
      options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
      dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.num_workers))
    return _explain_killed_workers(iter(dataset))
  return iter(dataset)


def _explain_killed_workers(batches):
  """Yield the batches; raise UserError if the system killed a worker process, which happens if memory runs out."""
  with contextlib.closing(batches):
    try:
      yield from batches
    except RuntimeError as error:
      if 'terminated unexpectedly' not in str(error):
        raise
      raise UserError(
        'a process that makes batches was killed, probably because memory or shared memory (/dev/shm) ran out: set '
        'data.num_workers to a smaller number, or to 0'
      ) from error


def validation_batches(source, corrupt, cfg):
  """Yield packed batches that together hold each validation example once, always with the same corruption.

  The numbers of dropped tokens are stratified over the examples, not drawn independently. The batches do not depend on
  `cfg.seed`, so losses of different steps and runs can be compared. Unused segments of a row have weight 0. Raises
  UserError if an example does not fit into an empty row.
  """
  count, size = len(source), cfg.data.batch_size
  quantile = (permute(np.arange(count), count, (0, 0x53545241)) + 0.5) / count  # the constant is "STRA" in ASCII
  shape = dataclasses.replace(shape_of(cfg.data), rows=cfg.data.rows)
  for first in range(0, count, size):
    ids = range(first, min(first + size, count))
    examples = {i: corrupt(example_rng(0, 'validation', i), source[i], cfg.corrupt, u=quantile[i]) for i in ids}
    while examples:
      batch = pack([*examples.values()], [*examples], shape)
      placed = set(batch['example_id_BxS'].ravel().tolist())
      if placed == {-1}:
        length = next(iter(examples.values()))['length']
        raise UserError(
          f'a validation example of {length} tokens does not fit into an empty row: raise '
          f'data.row_length={shape.length} or data.targets={shape.targets}'
        )
      yield batch
      examples = {i: example for i, example in examples.items() if i not in placed}
