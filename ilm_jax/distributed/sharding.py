"""The mesh, and the one table from logical axis names to mesh axes.

The axes (data, fsdp, tensor) always exist, of size 1 when unused: one code path from a laptop to a pod.
"""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ilm_jax.types import UserError

AXES = ('data', 'fsdp', 'tensor')

RULES = {
  'rows': ('data', 'fsdp'),  # of a batch
  'vocab': ('tensor', 'fsdp'),
  'part': ('tensor',),  # of a vocabulary
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
}


# --- within a program -------------------------------------------------------------------------------------------------


def on(mesh: Mesh | None):
  """Decorate a function to be jitted: what it calls knows the mesh, so that `constrain` and `gather` work."""

  def decorate(function):
    @functools.wraps(function)
    def traced(*args, **kwargs):
      if mesh is None:
        return function(*args, **kwargs)
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(*args, **kwargs)

    return traced

  return decorate


def ways(axis: str) -> int:
  """The size of an axis of the mesh that a program is for; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def several() -> bool:
  """Whether a program is for a mesh of several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def constrain(x, names):
  """Say where an array of these logical axis names lies; nothing without a mesh."""
  if not several():
    return x
  return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, jax.sharding.get_abstract_mesh()))


def gather(x, names):
  """A parameter as products read it: whole over fsdp, whose devices have rows of their own, cut over tensor."""
  if not several():
    return x
  spec = spec_of(names, x.shape, jax.sharding.get_abstract_mesh(), whole='fsdp')
  return jax.lax.with_sharding_constraint(x, spec)


# --- meshes -----------------------------------------------------------------------------------------------------------


def read_mesh(text: str) -> dict[str, int]:
  """The sizes of `data=4,tensor=2`; axes that are not named have size 1, or all that is left, if data is not."""
  sizes = {'data': -1, 'fsdp': 1, 'tensor': 1}
  for part in text.split(','):
    name, _, size = part.strip().partition('=')
    if name not in AXES or not size.removeprefix('-').isdigit():
      raise UserError(f'mesh {text!r}: expected sizes of {", ".join(AXES)}, such as data=4,tensor=2 (-1: what is left)')
    sizes[name] = int(size)
  return sizes


def make_mesh(cfg, devices=None) -> Mesh:
  """Build the mesh of `cfg.data x cfg.fsdp x cfg.tensor` devices; one of them may be -1, what is left."""
  devices = jax.devices() if devices is None else devices
  sizes = [cfg[axis] for axis in AXES]
  asked = ', '.join(f'mesh.{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'{asked}: expected sizes of at least 1, at most one of them -1 (what is left)')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    fits = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    raise UserError(
      f'{asked} does not fit {len(devices)} device(s): the product must be {len(devices)}, '
      f'so each size one of {", ".join(map(str, fits))}, or -1 for what is left'
    )
  slices = slices_of(devices)
  if sizes[0] % len(slices):
    raise UserError(
      f'{asked}: the devices lie on {len(slices)} slices, between which only mesh.data may go: make it a multiple of '
      f'{len(slices)}'
    )
  inner = (sizes[0] // len(slices), *sizes[1:])
  try:
    parts = [mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True) for part in slices]
  except NotImplementedError as error:
    raise UserError(f'{asked} cannot be laid onto these devices ({str(error)[:160]}): choose other sizes') from None
  return Mesh(np.concatenate([by_host(part) for part in parts]), AXES, (AxisType.Auto,) * 3)


def by_host(devices):
  """A mesh of devices whose rows, of tensor neighbours, are ordered by host: a host's part of a batch is in one piece.

  Within a host they stay in the order that follows the links.
  """
  rows = devices.reshape(-1, devices.shape[-1])
  order = sorted(range(len(rows)), key=lambda row: min(device.process_index for device in rows[row]))
  return rows[order].reshape(devices.shape)


def slices_of(devices) -> list[list]:
  """The devices of each TPU slice: within one they are joined by fast links (ICI), between them by a network (DCN)."""
  slices = {}
  for device in devices:
    index = getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0
    slices.setdefault(index, []).append(device)
  return [slices[index] for index in sorted(slices)]


def check_model(cfg, mesh: Mesh) -> str | None:
  """Refuse sizes of a model that a mesh can't share evenly; returns what is worth saying of the vocabulary.

  Args:
    cfg: `num_heads`, `d_ff`, `d_model` and `vocab_size`.
    mesh: of devices.
  """
  for name, axis in (('num_heads', 'tensor'), ('d_ff', 'tensor'), ('d_model', 'fsdp')):
    size, ways = getattr(cfg, name), mesh.shape[axis]
    if size % ways:
      fits = [n for n in range(1, min(size, mesh.size) + 1) if size % n == 0 and mesh.size % n == 0]
      raise UserError(
        f'model.{name}={size} does not divide over mesh.{axis}={ways}: use mesh.{axis}= one of '
        f'{", ".join(map(str, fits))}, or another size'
      )
  ways = math.prod(mesh.shape[axis] for axis in RULES['vocab'])
  if cfg.vocab_size % ways == 0:
    return None
  here = NamedSharding(mesh, spec_of(('vocab',), (cfg.vocab_size,), mesh)).shard_shape((cfg.vocab_size,))
  parts = cfg.vocab_size // here[0]
  return (
    f'the vocabulary of {cfg.vocab_size} does not divide over {ways} devices (mesh.fsdp x mesh.tensor): its two tables '
    f'are {f"cut into {parts}" if parts > 1 else "whole on each of them"}'
  )


def placement(tree) -> list[str]:
  """A line for each kind of array of a state: how many, shape, where it is cut, bytes of each on a device."""
  kinds = {}
  for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = re.sub(r'block_\d+', 'block_*', jax.tree_util.keystr(path, simple=True, separator='/'))
    kinds.setdefault((name, array.shape, str(array.sharding.spec)), []).append(bytes_here(array))
  return [
    f'{len(sizes):4d} x {name} {"x".join(map(str, shape)) or "scalar"} {spec[spec.index("(") :]} '
    f'{sizes[0]:,} bytes a device'
    for (name, shape, spec), sizes in kinds.items()
  ]


def bytes_here(array) -> int:
  """Bytes of an array on each of its devices."""
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def spec_of(names, shape, mesh, whole: str | None = None) -> P:
  """Where an array of logical axis names goes; without `whole`, and without axes that don't divide their dimension."""
  entries = []
  for size, name in zip(shape, names, strict=False):
    axes = ()
    for axis in RULES.get(name, ()):
      if axis != whole and size % math.prod(mesh.shape[one] for one in (*axes, axis)) == 0:
        axes += (axis,)
    entries.append(axes or None)
  return P(*entries)


def state_shardings(boxed, mesh: Mesh):
  """Shardings of a tree whose leaves may be boxed with logical names (as `model.init` does); the rest is replicated."""

  def is_box(leaf):
    return hasattr(leaf, 'names') and hasattr(leaf, 'value')

  def sharding(leaf):
    if is_box(leaf):
      return NamedSharding(mesh, spec_of(leaf.names, leaf.value.shape, mesh))
    return NamedSharding(mesh, P())

  return jax.tree.map(sharding, boxed, is_leaf=is_box)


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis of a batch, over data and fsdp."""
  return NamedSharding(mesh, P(RULES['rows']))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def row_parts(mesh: Mesh) -> int:
  """Parts that the rows of a batch are cut into."""
  return math.prod(mesh.shape[axis] for axis in RULES['rows'])


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
  """Refuse a number of rows that the mesh can't share evenly."""
  ways = row_parts(mesh)
  if rows % ways:
    below = rows // ways * ways
    fits = f'{below} or {below + ways}' if below else str(ways)
    raise UserError(f'{name}={rows} does not divide over {ways} devices (mesh.data x mesh.fsdp): use {fits}')


def my_part(mesh: Mesh) -> tuple[int, int]:
  """(index, number) of the equal parts of a batch's rows, one of which lies on this process's devices.

  Processes that share rows, because a tensor axis spans them, have the same part.
  """
  parts = row_parts(mesh)
  where = rows_sharding(mesh).addressable_devices_indices_map((parts,))
  mine = sorted({index[0].indices(parts)[0] for index in where.values()})
  if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
    raise UserError(
      f'the mesh gives the rows {mine} of {parts} parts to process {jax.process_index()}: expected neighbours; '
      'make mesh.tensor a divisor or a multiple of the devices of a host'
    )
  return mine[0] // len(mine), parts // len(mine)


def put_part(batch, mesh: Mesh):
  """The part of a batch that this process has read (`my_part`), as global arrays on the mesh."""
  sharding = rows_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x)) for name, x in batch.items()}


def put_batch(batch, mesh: Mesh):
  """A whole batch, which every process has, as global arrays on the mesh."""
  sharding = rows_sharding(mesh)
  arrays = {name: np.asarray(x) for name, x in batch.items()}
  return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in arrays.items()}
