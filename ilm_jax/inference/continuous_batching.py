"""Continuous batching: a queue of prompts, a fixed number of slots on the device, finished rows exchanged for new ones.

Rows live in pools, one for each length of buffer. A row that outgrows its pool waits there until a slot of the next one
is free. A pool of buffers twice as long has half the slots, so that a forward pass of each costs about the same, and
the pool that runs is the longest full one, so that passes are of full pools for as long as there are prompts. The host
is asked only when slots of the running pool are free.

No operation mixes rows: what a request gives depends on the seed, its number and its text.
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
  """Slots of one length of buffer, and who is in them."""

  def __init__(self, size: int, slots: int):
    self.size, self.slots = size, slots
    self.rows: growing.Rows | None = None
    self.owner: list[int | None] = [None] * slots
    self.parked = np.zeros(slots, bool)  # too long for this pool, waiting for a slot of the next one
    self.waiting: collections.deque = collections.deque()  # of (index, request, prompt)

  def free(self) -> list[int]:
    """The slots without a row."""
    return [slot for slot, owner in enumerate(self.owner) if owner is None]

  def running(self) -> int:
    """Rows that a forward pass would change."""
    return sum(owner is not None for owner in self.owner) - int(self.parked.sum())


class ContinuousSampler:
  """Samples a stream of prompts, in whatever order they finish; the parameters are an argument.

  Args:
    model_cfg: of the model.
    family: module of the family; one whose rows do not grow is sampled in batches of `slots`.
    sample_cfg: its settings (`families.*.SampleConfig`).
    slots: rows in buffers of the shortest length.
    refill: slots that are free before new rows are put there; an eighth by default.
    mesh: where the rows are shared out, if given.
  """

  def __init__(self, model_cfg, family, sample_cfg, slots: int, *, refill: int | None = None, mesh=None):
    self.family, self.cfg, self.mesh = family, sample_cfg, mesh
    self.growth = family.growth
    if self.growth is None:
      self.batches = static_batching.Sampler(model_cfg, family, sample_cfg, slots, mesh)
      return
    parts = 1
    if mesh is not None:
      sharding.check_rows(slots, mesh, 'batch_size')
      parts = sharding.row_parts(mesh)
    self.sizes = growing.buffers(1, sample_cfg)
    self.slots = [max(parts, slots * self.sizes[0] // size // parts * parts) for size in self.sizes]
    self.refill, self.parts = refill, parts
    growth, cfg = self.growth, sample_cfg
    # What the host looks at is on every device, so that every process of several can.
    seen, flags, rows_first = {}, {}, {}
    if mesh is not None:
      seen = {'out_shardings': sharding.replicated(mesh)}
      flags = {'out_shardings': (None, sharding.replicated(mesh))}
      rows_first = {'out_shardings': sharding.rows_sharding(mesh)}

    @functools.partial(jax.jit, static_argnames='size')
    @sharding.on(mesh)
    def begin(params, rng, prompt, size):
      return growth.begin(transformer.Forward(model_cfg, params), rng, prompt, cfg, size)

    @functools.partial(jax.jit, donate_argnums=0)
    def place(into, rows, take_B):
      rows = growing.resize(rows, into.tokens_BxL.shape[1])
      moved = jax.tree.map(lambda array: array[jnp.maximum(take_B, 0)], rows)
      moved = moved._replace(active_B=moved.length_B > 0)

      def mix(new, old):
        return jnp.where((take_B >= 0).reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

      return jax.tree.map(mix, moved, into)

    @functools.partial(jax.jit, static_argnames=('size', 'slots'), **rows_first)
    def empty(like, size, slots):
      keys_B = jax.random.split(like.rng_B[0], slots)
      shapes = jax.eval_shape(lambda rows: growing.resize(rows, size), like._replace(rng_B=()))
      rows = jax.tree.map(lambda array: jnp.zeros((slots, *array.shape[1:]), array.dtype), shapes)
      return rows._replace(rng_B=keys_B)

    @functools.partial(jax.jit, donate_argnums=1, **flags)
    @sharding.on(mesh)
    def advance(params, rows, leaving):
      step = functools.partial(growth.step, transformer.Forward(model_cfg, params), cfg)
      size, running = rows.tokens_BxL.shape[1], rows.active_B.sum()

      def park(rows, parked_B):
        full_B = rows.active_B & (growth.needed(rows.length_B, cfg) > size) & (size < cfg.capacity)
        return rows._replace(active_B=rows.active_B & ~full_B), parked_B | full_B

      def going(carry):
        now = carry[0].active_B.sum()
        return (now > 0) & (running - now < leaving)

      start = park(rows, jnp.zeros_like(rows.active_B))
      rows, parked_B = jax.lax.while_loop(going, lambda carry: park(step(carry[0]), carry[1]), start)
      return rows, (rows.active_B, parked_B)

    self._begin, self._empty, self._place, self._advance = begin, empty, place, advance
    self._finish = jax.jit(lambda rows: growth.finish(rows, cfg), **seen)

  def __call__(self, params, rng, prompts, requests=None):
    """Sample one row for each prompt.

    Args:
      params: of the model.
      rng: key of the whole run.
      prompts: an iterable of {'tokens': int[n], 'open': bool[n]}, perhaps with 'free', 'least' and 'most'; it is read
        as slots become free.
      requests: identity of each, 0, 1, ... by default; a row's randomness depends on nothing else.

    Yields:
      (index of the prompt, a dict of each field of `Sampled`, cut to the row), as rows finish.
    """
    if self.growth is None:
      yield from enumerate(self.batches(params, rng, list(prompts), requests))
      return
    numbered = enumerate(prompts) if requests is None else zip(requests, prompts, strict=True)
    source = iter((index, request, prompt) for index, (request, prompt) in enumerate(numbered))
    pools = [Pool(size, slots) for size, slots in zip(self.sizes, self.slots, strict=True)]
    more = True
    while True:
      while more and sum(len(pool.waiting) for pool in pools) < self.slots[0]:
        entry = next(source, None)
        more = entry is not None
        if more:
          static_batching.check(entry[2], self.family, self.cfg)
          self._pool_of(entry[2], pools).waiting.append(entry)
      for below, pool in reversed(list(itertools.pairwise(pools))):
        self._lift(below, pool)
      for pool in pools:
        self._enter(params, rng, pool)
      running = [pool for pool in pools if pool.running()]
      if not running:
        return
      full = [pool for pool in running if not pool.free()]
      pool = full[-1] if full else running[0]
      others = any(other.size < pool.size and other.running() + other.parked.sum() for other in pools)
      coming = more or others or any(other.waiting for other in pools if other.size <= pool.size)
      refill = self.refill or max(1, pool.slots // 8)
      yield from self._run(params, pool, min(refill, pool.running()) if coming else pool.running())

  def lower(self, params, rng, slots: int):
    """The step of the pool of the longest rows, with so many of them, lowered for shapes alone (to compile ahead)."""
    size = self.sizes[-1]
    prompt = static_batching.pad([], [], slots, size)
    rows = jax.eval_shape(functools.partial(self._begin, size=size), params, rng, prompt)
    if self.mesh is not None:
      place = sharding.rows_sharding(self.mesh)
      rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), rows)
    return self._advance.lower(params, rows, 1)

  def _pool_of(self, prompt, pools) -> Pool:
    """The first pool with room for one more token."""
    length = len(prompt['tokens']) + self.cfg.capacity - self.cfg.max_length
    return next((pool for pool in pools if length < pool.size), pools[-1])

  def _move(self, rows: growing.Rows, pool: Pool, taken: dict[int, int], owners: list) -> None:
    """Put rows[taken[slot]] into each slot of a pool."""
    if pool.rows is None:
      pool.rows = self._empty(rows, pool.size, pool.slots)
    take = np.full(pool.slots, -1, np.int32)
    for slot, row in taken.items():
      take[slot], pool.owner[slot] = row, owners[row]
    pool.rows = self._place(pool.rows, rows, take)

  def _lift(self, below: Pool, pool: Pool) -> None:
    """Move rows that are too long for one pool to free slots of the next."""
    moves = dict(zip(pool.free(), np.flatnonzero(below.parked).tolist(), strict=False))
    if not moves:
      return
    self._move(below.rows, pool, moves, below.owner)
    for row in moves.values():
      below.owner[row], below.parked[row] = None, False

  def _enter(self, params, rng, pool: Pool) -> None:
    """Begin waiting prompts in free slots, a few at a time."""
    free = pool.free()
    few = max(self.parts, pool.slots // 8 // self.parts * self.parts)
    while free and pool.waiting:
      entries = [pool.waiting.popleft() for _ in range(min(few, len(free), len(pool.waiting)))]
      batch = static_batching.pad([p for *_, p in entries], [request for _, request, _ in entries], few, pool.size)
      if self.mesh is not None:
        batch = type(batch)(**sharding.put_batch(batch._asdict(), self.mesh))
      slots, free = free[: len(entries)], free[len(entries) :]
      moves = {slot: row for row, slot in enumerate(slots)}
      self._move(self._begin(params, rng, batch, pool.size), pool, moves, [index for index, *_ in entries])

  def _run(self, params, pool: Pool, leaving: int):
    """Forward passes of a pool until so many of its rows have left it; yields those that are finished."""
    pool.rows, flags = self._advance(params, pool.rows, leaving)
    active_B, parked_B = jax.device_get(flags)
    pool.parked |= parked_B
    done = [
      slot for slot, owner in enumerate(pool.owner) if owner is not None and not active_B[slot] | pool.parked[slot]
    ]
    if not done:
      return
    sampled = jax.device_get(self._finish(pool.rows))
    for slot in done:
      index, pool.owner[slot] = pool.owner[slot], None
      yield index, static_batching.cut(sampled, slot)
