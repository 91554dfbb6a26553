"""The device mesh, the table from logical axis names to mesh axes, and the sharding of parameters and batches.

The mesh axes (data, fsdp, tensor) always exist, with size 1 if unused, so that the same code serves any device count.
"""

import contextlib
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ilm_jax.types import UserError

AXES = ('data', 'fsdp', 'tensor')

# Logical axis name -> mesh axes over which it is sharded.
RULES = {
  'rows': ('data', 'fsdp'),  # rows of a batch
  'vocab': ('tensor', 'fsdp'),  # vocabulary entries of an embedding table
  'vocab_shard': ('tensor',),  # vocabulary shards of the output embedding after the all-gather over fsdp
  'embed': ('fsdp',),  # model width (d_model)
  'heads': ('tensor',),  # attention heads
  'mlp': ('tensor',),  # hidden units of an MLP
}


def spec_of(names, shape, mesh, whole: str | None = None) -> P:
  """Return the PartitionSpec of an array from the logical name (or None) of each axis.

  A mesh axis is left out if its size does not divide the array's dimension. The array is replicated over the mesh axis
  `whole`.
  """
  entries = []
  for size, name in zip(shape, names, strict=False):
    axes = ()
    for axis in RULES.get(name, ()):
      if axis != whole and size % math.prod(mesh.shape[used] for used in (*axes, axis)) == 0:
        axes += (axis,)
    entries.append(axes or None)
  return P(*entries)


def state_shardings(boxed, mesh: Mesh):
  """Return the sharding of each leaf of a training state; leaves without logical axis names are replicated."""

  def is_box(leaf):
    return hasattr(leaf, 'names') and hasattr(leaf, 'value')

  def sharding(leaf):
    return NamedSharding(mesh, spec_of(leaf.names, leaf.value.shape, mesh) if is_box(leaf) else P())

  return jax.tree.map(sharding, boxed, is_leaf=is_box)


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a batch array: its first axis (rows) is split over the mesh axes data and fsdp."""
  return NamedSharding(mesh, P(RULES['rows']))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding that puts a full copy of an array on every device."""
  return NamedSharding(mesh, P())


@contextlib.contextmanager
def with_mesh(mesh: Mesh | None):
  """Return a decorator for a function to be jitted: while it is traced, `constrain` and `gather` use this mesh."""
  with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def axis_size(axis: str) -> int:
  """Return the size of an axis of the mesh in use (see `with_mesh`); 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def on_several_devices() -> bool:
  """Return whether the mesh in use (see `with_mesh`) has more than one device."""
  return jax.sharding.get_abstract_mesh().size > 1


def constrain(x, names, whole: str | None = None):
  """Shard an array by the logical names of its axes, as `spec_of` says; return it unchanged on a single device."""
  if not on_several_devices():
    return x
  return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, jax.sharding.get_abstract_mesh(), whole))


def gather(x, names):
  """All-gather a parameter over the mesh axis fsdp before its use; it stays sharded over the mesh axis tensor."""
  return constrain(x, names, whole='fsdp')


def read_mesh(text: str) -> dict[str, int]:
  """Parse mesh sizes such as 'data=4,tensor=2'; the default is 1 for fsdp and tensor, -1 (all remaining) for data."""
  sizes = {'data': -1, 'fsdp': 1, 'tensor': 1}
  for part in text.split(','):
    name, _, size = part.strip().partition('=')
    if name not in AXES or not size.removeprefix('-').isdecimal():
      expected = f'sizes of {", ".join(AXES)}, such as data=4,tensor=2 (-1: all remaining devices)'
      raise UserError(f'mesh {text!r}: expected {expected}')
    sizes[name] = int(size)
  return sizes


def make_mesh(cfg, devices=None) -> Mesh:
  """Build the mesh with axes data, fsdp and tensor; `cfg` maps each axis to its size (-1: all remaining devices).

  Raises UserError if the sizes do not fit the number of devices or of TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [cfg[axis] for axis in AXES]
  requested = ', '.join(f'mesh.{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'{requested}: expected sizes of at least 1, or, for one axis, -1 (all remaining devices)')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    raise UserError(f'{requested} does not fit {len(devices)} device(s): the product must be {len(devices)}, so make '
                    f'each size one of {", ".join(map(str, divisors))}, or -1 (all remaining devices)')  # fmt: skip
  slices = slices_of(devices)
  if sizes[0] % len(slices):
    raise UserError(f'{requested}: the devices are on {len(slices)} TPU slices, and only mesh.data may span slices: '
                    f'make mesh.data a multiple of {len(slices)}')  # fmt: skip
  slice_shape = (sizes[0] // len(slices), *sizes[1:])
  try:
    parts = [mesh_utils.create_device_mesh(slice_shape, part, allow_split_physical_axes=True) for part in slices]
  except NotImplementedError as error:
    problem = f'does not fit the topology of these devices ({str(error)[:160]})'
    raise UserError(f'{requested} {problem}: choose other sizes') from None
  return Mesh(np.concatenate([by_host(part) for part in parts]), AXES, (AxisType.Auto,) * 3)


def by_host(devices):
  """Reorder a device array by host, so that the rows of a batch that one host holds are contiguous.

  Devices along the last axis (tensor) stay together; those of a host keep their order, which follows physical links.
  """
  groups = devices.reshape(-1, devices.shape[-1])
  order = sorted(range(len(groups)), key=lambda group: min(device.process_index for device in groups[group]))
  return groups[order].reshape(devices.shape)


def slices_of(devices) -> list[list]:
  """Group devices by TPU slice: links within a slice (ICI) are faster than the network between slices (DCN)."""
  slices = {}
  for device in devices:
    index = getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0
    slices.setdefault(index, []).append(device)
  return [slices[index] for index in sorted(slices)]


def check_model(cfg, mesh: Mesh) -> str | None:
  """Raise UserError if num_heads, d_ff or d_model is not divisible by the size of the mesh axis that shards it.

  Return a warning if its vocab_size is not divisible by the mesh, else None.
  """
  for name, axis in (('num_heads', 'tensor'), ('d_ff', 'tensor'), ('d_model', 'fsdp')):
    size, count = getattr(cfg, name), mesh.shape[axis]
    if size % count:
      fits = [n for n in range(1, min(size, mesh.size) + 1) if size % n == 0 and mesh.size % n == 0]
      advice = f'use mesh.{axis}= one of {", ".join(map(str, fits))}, or another model.{name}'
      raise UserError(f'model.{name}={size} is not divisible by mesh.{axis}={count}: {advice}')
  count = math.prod(mesh.shape[axis] for axis in RULES['vocab'])
  if cfg.vocab_size % count == 0:
    return None
  shard = NamedSharding(mesh, spec_of(('vocab',), (cfg.vocab_size,), mesh)).shard_shape((cfg.vocab_size,))
  shards = cfg.vocab_size // shard[0]
  placed = f'cut into {shards}' if shards > 1 else 'whole on each of them'
  return (f'the vocabulary size {cfg.vocab_size} is not divisible by {count} devices (mesh.fsdp x mesh.tensor): '
          f'the two embedding tables are {placed}')  # fmt: skip


def describe_placement(tree) -> list[str]:
  """Describe the sharding of a training state; arrays of the same name in all transformer blocks share a line.

  A line has the number of these arrays, their name, shape and PartitionSpec, and the bytes per device of one array.
  """
  kinds = {}
  for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = re.sub(r'block_\d+', 'block_*', jax.tree_util.keystr(path, simple=True, separator='/'))
    kinds.setdefault((name, array.shape, str(array.sharding.spec)), []).append(bytes_per_device(array))
  return [
    f'{len(sizes):4d} x {name} {"x".join(map(str, shape)) or "scalar"} {spec[spec.index("(") :]} '
    f'{sizes[0]:,} bytes a device'
    for (name, shape, spec), sizes in kinds.items()
  ]


def bytes_per_device(array) -> int:
  """Return the number of bytes that an array takes on each of its devices."""
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def num_row_shards(mesh: Mesh) -> int:
  """Return the number of shards that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in RULES['rows'])


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
  """Raise UserError if the rows of a batch cannot be split equally over the mesh; `name` is the setting to change."""
  count = num_row_shards(mesh)
  if rows % count:
    below = rows // count * count
    fits = f'{below} or {below + count}' if below else str(count)
    raise UserError(f'{name}={rows} is not divisible by {count} devices (mesh.data x mesh.fsdp): use {fits}')


def process_shard(mesh: Mesh) -> tuple[int, int]:
  """Return (index, count): a batch's rows are split into `count` equal parts, and this process holds part `index`.

  Processes that share a group of the tensor axis hold the same rows. Raises UserError if the rows are not contiguous.
  """
  shards = num_row_shards(mesh)
  where = rows_sharding(mesh).addressable_devices_indices_map((shards,))
  mine = sorted({index[0].indices(shards)[0] for index in where.values()})
  if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
    raise UserError(f'the mesh gives process {jax.process_index()} the row shards {mine} of {shards}, which are not '
                    'contiguous: make mesh.tensor a divisor or a multiple of the devices per host')  # fmt: skip
  return mine[0] // len(mine), shards // len(mine)


def put_process_batch(batch, mesh: Mesh):
  """Turn this process's part of a batch (see `process_shard`) into global arrays on the mesh."""
  sharding = rows_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x)) for name, x in batch.items()}


def put_global_batch(batch, mesh: Mesh):
  """Turn a whole batch, which every process has, into global arrays on the mesh."""
  sharding = rows_sharding(mesh)
  arrays = {name: np.asarray(x) for name, x in batch.items()}
  return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in arrays.items()}
