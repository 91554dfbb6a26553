"""Device meshes, the sharding of arrays on a mesh, and errors for mesh or model sizes that are not divisible."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small

from ilm_jax.distributed import sharding
from ilm_jax.types import UserError


def test_an_array_axis_that_is_not_divisible_by_its_mesh_axes_is_not_sharded():
  spec = sharding.spec_of(('vocab', None), (20, 16), small.mesh(2, 2, 2))
  assert spec == jax.sharding.PartitionSpec(('tensor', 'fsdp'), None)
  assert sharding.spec_of(('vocab', None), (17, 16), small.mesh(2, 2, 2))[0] is None
  wide = small.mesh(fsdp=2, tensor=4)
  assert [sharding.spec_of(('vocab', None), (size, 16), wide)[0] for size in (12, 18)] == ['tensor', 'fsdp']


@pytest.mark.parametrize('sizes', [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_the_error_for_a_mesh_that_does_not_fit_the_devices_lists_the_sizes_that_fit(sizes):
  cfg = dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
  with pytest.raises(UserError, match=r'does not fit 8 device.*one of 1, 2, 4, 8, or -1') as error:
    sharding.make_mesh(cfg, jax.devices())
  assert f'mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}' in str(error.value)


def test_devices_are_grouped_by_tpu_slice():
  devices = [SimpleNamespace(id=i, platform='tpu', slice_index=i // 4 % 2) for i in (4, 5, 6, 7, 0, 1, 2, 3)]
  assert [[device.id for device in part] for part in sharding.slices_of(devices)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  gpus = [SimpleNamespace(id=i, platform='gpu', slice_index=i // 4) for i in range(8)]
  assert len(sharding.slices_of(gpus)) == 1  # on GPUs, slice_index is the index of a host, and any axis may span hosts


def test_each_host_holds_consecutive_rows_of_the_batch():
  def torus(side):
    """Return the chips of a side x side TPU slice, 4 per host, in the order of a ring through all chips."""
    chips = [(x, y if x % 2 == 0 else side - 1 - y) for x in range(side) for y in range(side)]
    return np.array([SimpleNamespace(process_index=x // 2 * side // 2 + y // 2, at=(x, y)) for x, y in chips])

  for shape in ((16, 1, 1), (1, 16, 1), (4, 4, 1), (4, 2, 2)):
    found = sharding.by_host(torus(4).reshape(shape))
    assert found.shape == shape and len({device.at for device in found.ravel()}) == 16
    first = [min(device.process_index for device in row) for row in found.reshape(-1, shape[-1])]
    assert first == sorted(first)
  hosts = [device.process_index for device in sharding.by_host(torus(4).reshape(16, 1, 1)).ravel()]
  assert hosts == sorted(hosts)


def test_fsdp_and_tensor_axes_do_not_span_several_tpu_slices(monkeypatch):
  devices = jax.devices()
  monkeypatch.setattr(sharding, 'slices_of', lambda devices: [devices[1::2], devices[::2]])
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, devices)
  ids = np.vectorize(lambda device: device.id)(mesh.devices)
  assert [set(part.ravel().tolist()) for part in ids] == [{1, 3, 5, 7}, {0, 2, 4, 6}]
  assert dict(mesh.shape) == dict(small.mesh(2, 2, 2).shape)
  with pytest.raises(UserError, match=r'on 2 TPU slices, .* only mesh\.data .*: make mesh\.data a multiple of 2'):
    sharding.make_mesh({'data': 1, 'fsdp': 8, 'tensor': 1}, devices)


@pytest.mark.parametrize('sizes', [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_impossible_mesh_sizes_are_refused(sizes):
  with pytest.raises(UserError, match='at least 1, or, for one axis, -1'):
    sharding.make_mesh(dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)), jax.devices())


SIZES = {'num_heads': 4, 'd_model': 32, 'd_ff': 64, 'vocab_size': 32}


@pytest.mark.parametrize('sizes, message', [
  ({'num_heads': 3}, 'model.num_heads=3 is not divisible by mesh.tensor=4: use mesh.tensor= one of 1, or'),
  ({'num_heads': 6}, 'model.num_heads=6 is not divisible by mesh.tensor=4: use mesh.tensor= one of 1, 2, or'),
  ({'d_ff': 66}, 'model.d_ff=66 is not divisible by mesh.tensor=4: use mesh.tensor= one of 1, 2, or'),
  ({'d_model': 33}, 'model.d_model=33 is not divisible by mesh.fsdp=2: use mesh.fsdp= one of 1, or'),
])  # fmt: skip
def test_the_error_for_a_model_size_that_the_mesh_does_not_divide_lists_mesh_sizes_that_do(sizes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    sharding.check_model(SimpleNamespace(**SIZES | sizes), small.mesh(fsdp=2, tensor=4))


def test_a_warning_reports_a_vocabulary_size_that_is_not_divisible_by_the_number_of_devices():
  mesh = small.mesh(fsdp=2, tensor=4)
  assert sharding.check_model(SimpleNamespace(**SIZES), mesh) is None
  for size, how in ((30, 'cut into 2'), (31, 'whole on each of them')):
    warning = sharding.check_model(SimpleNamespace(**SIZES | {'vocab_size': size}), mesh)
    assert warning.startswith(f'the vocabulary size {size} is not divisible by 8 devices') and warning.endswith(how)


def test_describe_placement_lists_the_bytes_of_each_array_per_device():
  state = small.experiment({'model.num_layers': 2}, data=2, fsdp=2, tensor=2)[3]
  lines = sharding.describe_placement(state)
  assert "   2 x params/block_*/mlp_in/kernel 16x32 ('fsdp', 'tensor') 512 bytes a device" in lines
  total = sum(int(line.split()[0]) * int(line.split()[-4].replace(',', '')) for line in lines)
  held = [shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards if shard.device.id == 0]
  assert total == sum(held) == sum(map(sharding.bytes_per_device, jax.tree.leaves(state)))


def test_read_mesh_parses_a_mesh_flag():
  assert sharding.read_mesh('tensor=2') == {'data': -1, 'fsdp': 1, 'tensor': 2}
  assert sharding.read_mesh('data=2, fsdp=4') == {'data': 2, 'fsdp': 4, 'tensor': 1}
  for wrong in ('tensors=2', 'data', 'data=two', '4', ''):
    with pytest.raises(UserError, match=r"mesh '.*': expected sizes of data, fsdp, tensor, such as"):
      sharding.read_mesh(wrong)
