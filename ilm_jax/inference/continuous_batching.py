"""Continuous batching: requests wait in a queue, and finished rows on the device are replaced by new requests.

The device holds one pool of slots for each buffer length. A row starts in the shortest buffer that fits its prompt. A
row that outgrows its buffer is parked until the pool with the next longer buffers has a free slot. Doubling the buffer
length halves the number of slots, so that a forward pass costs about the same in every pool. Among the full pools, the
one with the longest buffers runs first, which keeps batches full as long as requests are waiting. The host synchronizes
with the device only when slots of the running pool become free.

No operation mixes rows, so the result of a request depends only on the seed, the request's number and its prompt.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.distributed import sharding
from ilm_jax.families import growing
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer


class Pool:
  """A pool of `slots` decoding slots with buffers of `size` positions, and its queue of waiting requests."""

  def __init__(self, size: int, slots: int):
    self.size, self.slots = size, slots
    self.rows: growing.Rows | None = None  # rows on the device; None before the first request is admitted
    self.owner: list[int | None] = [None] * slots  # index of the prompt decoded in each slot; None: the slot is free
    self.parked = np.zeros(slots, bool)  # whether a slot's row has outgrown its buffer and waits for a longer one
    self.waiting: collections.deque = collections.deque()  # (index of the prompt, request number, prompt)

  def free(self) -> list[int]:
    """Return the indices of the slots that hold no row."""
    return [slot for slot, owner in enumerate(self.owner) if owner is None]

  def running(self) -> int:
    """Return the number of rows that are being decoded, without the parked rows, which wait for a longer buffer."""
    return sum(owner is not None for owner in self.owner) - int(self.parked.sum())


class ContinuousSampler:
  """Samples a stream of prompts by continuous batching, and yields each row when it finishes.

  The arguments are those of `StaticSampler`, with the number of slots of the pool with the shortest buffers as batch
  size. `refill` rows must leave a pool before new rows are admitted, by default an eighth of its slots. Families whose
  rows do not grow while decoding use static batches of `slots` rows.
  """

  def __init__(self, model_cfg, family, sample_cfg, slots: int, *, refill: int | None = None, mesh=None):
    self.family, self.cfg, self.mesh = family, sample_cfg, mesh
    self.growth = family.growth
    if self.growth is None:
      self.batches = static_batching.StaticSampler(model_cfg, family, sample_cfg, slots, mesh)
      return
    row_shards, replicated, rows_and_replicated, sharded = 1, {}, {}, {}
    if mesh is not None:
      sharding.check_rows(slots, mesh, 'batch_size')
      row_shards = sharding.num_row_shards(mesh)
      # Arrays that the host reads are replicated, so that every process can read them.
      replicated = {'out_shardings': sharding.replicated(mesh)}
      rows_and_replicated = {'out_shardings': (None, sharding.replicated(mesh))}
      sharded = {'out_shardings': sharding.rows_sharding(mesh)}
    self.sizes = growing.buffers(1, sample_cfg)
    self.slots = [max(row_shards, slots * self.sizes[0] // size // row_shards * row_shards) for size in self.sizes]
    self.refill, self.row_shards = refill, row_shards
    growth, cfg = self.growth, sample_cfg

    @functools.partial(jax.jit, static_argnames='size')
    @sharding.with_mesh(mesh)
    def begin(params, rng, prompt, size):
      """Return new rows for a batch of prompts, in buffers of `size` positions."""
      return growth.begin(transformer.Forward(model_cfg, params), rng, prompt, cfg, size)

    @functools.partial(jax.jit, donate_argnums=0)
    def place(target, source, source_row_B):
      """Return `target` with slot i replaced by row source_row_B[i] of `source`, unless source_row_B[i] is -1."""
      source = growing.resize(source, target.tokens_BxL.shape[1])
      moved = jax.tree.map(lambda array: array[jnp.maximum(source_row_B, 0)], source)
      moved = moved._replace(active_B=moved.length_B > 0)

      def select(new, old):
        return jnp.where((source_row_B >= 0).reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

      return jax.tree.map(select, moved, target)

    @functools.partial(jax.jit, static_argnames=('size', 'slots'), **sharded)
    def empty(like, size, slots):
      """Return inactive rows for all slots of a new pool, with the tree structure and dtypes of the rows `like`."""
      keys_B = jax.random.split(like.rng_B[0], slots)
      shapes = jax.eval_shape(lambda rows: growing.resize(rows, size), like._replace(rng_B=()))
      rows = jax.tree.map(lambda array: jnp.zeros((slots, *array.shape[1:]), array.dtype), shapes)
      return rows._replace(rng_B=keys_B)

    @functools.partial(jax.jit, donate_argnums=1, **rows_and_replicated)
    @sharding.with_mesh(mesh)
    def advance(params, rows, min_exits):
      """Decode until `min_exits` rows have finished or outgrown their buffer; return (rows, (active_B, parked_B))."""
      step = functools.partial(growth.step, transformer.Forward(model_cfg, params), cfg)
      size, num_active = rows.tokens_BxL.shape[1], rows.active_B.sum()

      def park(rows, parked_B):
        full_B = rows.active_B & (growth.needed(rows.length_B, cfg) > size) & (size < cfg.capacity)
        return rows._replace(active_B=rows.active_B & ~full_B), parked_B | full_B

      def should_continue(carry):
        now_active = carry[0].active_B.sum()
        return (now_active > 0) & (num_active - now_active < min_exits)

      start = park(rows, jnp.zeros_like(rows.active_B))
      rows, parked_B = jax.lax.while_loop(should_continue, lambda carry: park(step(carry[0]), carry[1]), start)
      return rows, (rows.active_B, parked_B)

    self._begin, self._empty, self._place, self._advance = begin, empty, place, advance
    self._finish = jax.jit(lambda rows: growth.finish(rows, cfg), **replicated)

  def __call__(self, params, rng, prompts, requests=None):
    """Sample a completion of each prompt; yield (index of the prompt, its row) in the order in which rows finish.

    Arguments and rows are those of `StaticSampler`; the iterable of prompts is consumed as slots become free.
    """
    if self.growth is None:
      yield from enumerate(self.batches(params, rng, list(prompts), requests))
      return
    numbered = enumerate(prompts) if requests is None else zip(requests, prompts, strict=True)
    source = ((index, request, prompt) for index, (request, prompt) in enumerate(numbered))
    pools = [Pool(size, slots) for size, slots in zip(self.sizes, self.slots, strict=True)]
    more_prompts = True
    while True:
      while more_prompts and sum(len(pool.waiting) for pool in pools) < self.slots[0]:
        if more_prompts := (entry := next(source, None)) is not None:
          static_batching.check(entry[2], self.family, self.cfg)
          self._first_pool(entry[2], pools).waiting.append(entry)
      for shorter, longer in reversed(list(itertools.pairwise(pools))):
        self._promote(shorter, longer)
      for pool in pools:
        self._admit(params, rng, pool)
      running = [pool for pool in pools if pool.running()]
      if not running:
        return
      full = [pool for pool in running if not pool.free()]
      pool = full[-1] if full else running[0]
      # A pool that no further row can enter runs until all its rows have finished or outgrown their buffers.
      more_shorter = any(other.size < pool.size and other.running() + other.parked.sum() for other in pools)
      more_waiting = any(other.waiting for other in pools if other.size <= pool.size)
      refill = self.refill or max(1, pool.slots // 8)
      min_exits = min(refill, pool.running()) if more_prompts or more_shorter or more_waiting else pool.running()
      yield from self._run(params, pool, min_exits)

  def lower(self, params, rng, slots: int):
    """Lower (trace without running) the decoding program for `slots` rows with the longest buffers."""
    size = self.sizes[-1]
    prompt = static_batching.pad([], [], slots, size)
    rows = jax.eval_shape(functools.partial(self._begin, size=size), params, rng, prompt)
    if self.mesh is not None:
      by_rows = sharding.rows_sharding(self.mesh)
      rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), rows)
    return self._advance.lower(params, rows, 1)

  def _first_pool(self, prompt, pools) -> Pool:
    """Return the pool with the shortest buffers that have room for the prompt and one more token."""
    length = len(prompt['tokens']) + self.cfg.capacity - self.cfg.max_length
    return next((pool for pool in pools if length < pool.size), pools[-1])

  def _move(self, source: growing.Rows, pool: Pool, moves: dict[int, int], owners: list) -> None:
    """Copy rows into a pool: `moves` maps its slots to rows of `source`, `owners` has the prompt index of each row."""
    if pool.rows is None:
      pool.rows = self._empty(source, pool.size, pool.slots)
    source_row_B = np.full(pool.slots, -1, np.int32)
    for slot, row in moves.items():
      source_row_B[slot], pool.owner[slot] = row, owners[row]
    pool.rows = self._place(pool.rows, source, source_row_B)

  @jax.enable_x64(False)
  def _promote(self, shorter: Pool, longer: Pool) -> None:
    """Move rows that have outgrown their buffers to free slots of the pool with the next longer buffers."""
    if moves := dict(zip(longer.free(), np.flatnonzero(shorter.parked).tolist(), strict=False)):
      self._move(shorter.rows, longer, moves, shorter.owner)
      for row in moves.values():
        shorter.owner[row], shorter.parked[row] = None, False

  @jax.enable_x64(False)
  def _admit(self, params, rng, pool: Pool) -> None:
    """Put waiting requests into the free slots of a pool, in batches of a fixed size."""
    free = pool.free()
    batch_size = max(self.row_shards, pool.slots // 8 // self.row_shards * self.row_shards)
    while free and pool.waiting:
      entries = [pool.waiting.popleft() for _ in range(min(batch_size, len(free), len(pool.waiting)))]
      indices, requests, prompts = map(list, zip(*entries, strict=True))
      batch = static_batching.pad(prompts, requests, batch_size, pool.size)
      if self.mesh is not None:
        batch = type(batch)(**sharding.put_global_batch(batch._asdict(), self.mesh))
      moves, free = {slot: row for row, slot in enumerate(free[: len(entries)])}, free[len(entries) :]
      self._move(self._begin(params, rng, batch, pool.size), pool, moves, indices)

  @jax.enable_x64(False)
  def _run(self, params, pool: Pool, min_exits: int):
    """Decode a pool until `min_exits` rows have finished or outgrown their buffers; return the finished rows."""
    pool.rows, flags = self._advance(params, pool.rows, min_exits)
    active_B, parked_B = jax.device_get(flags)
    pool.parked |= parked_B
    owned_B = np.array([owner is not None for owner in pool.owner])
    finished = np.flatnonzero(owned_B & ~active_B & ~pool.parked)
    sampled = jax.device_get(self._finish(pool.rows)) if len(finished) else None
    rows = [(pool.owner[slot], static_batching.cut(sampled, slot)) for slot in finished]
    for slot in finished:
      pool.owner[slot] = None
    return rows
