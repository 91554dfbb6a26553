"""The step, the optimizer, the mesh and the loop: numbers against dumber derivations, files read back."""

import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ilm_jax import metrics
from ilm_jax.configs import star
from ilm_jax.distributed import sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.inference import continuous_batching, static_batching
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.training import loop, optimizer, train_step
from ilm_jax.training.experiment import build
from ilm_jax.types import UserError


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with small.kept_programs(tmp_path_factory.mktemp('programs')):
    yield


SHARED = {'task.num_nodes': 25, 'model.num_heads': 4, 'optimizer.ema_decay': 0.24}  # a vocabulary of 32 divides


@pytest.fixture(scope='module')
def alone():
  return take_steps(SHARED, 3)


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())


def leaves(tree) -> dict[str, np.ndarray]:
  """Path -> array on the host."""
  named = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x) for path, x in named}


def assert_same_bits(actual, expected):
  actual, expected = leaves(actual), leaves(expected)
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


class Steps:
  """The compiled step of a config on a mesh, its fresh state and its first batches."""

  def __init__(self, changes, axes):
    self.exp, tx, schedule, self.state, self.abstract = small.experiment(changes, **dict(axes))
    self.start = jax.device_get(self.state)
    self.step = train_step.compile_step(self.exp, tx, schedule, self.abstract)

  def batches(self, count: int):
    return small.batches(self.exp, count)

  def run(self, batches):
    """Make updates; returns the states before and after each (on the host), the metrics of each, the last state."""
    state = jax.device_put(self.start, jax.tree.map(lambda x: x.sharding, self.abstract))
    states, pairs = [self.start], []
    for batch in batches:
      state, found = self.step(state, sharding.put_batch(batch, self.exp.mesh))
      states.append(jax.device_get(state))
      pairs.append(jax.device_get(found))
    return states, pairs, state


@functools.cache
def _steps(changes, axes):
  return Steps(changes, axes)


def steps_of(changes=(), **axes) -> Steps:
  """Build the step of a config once."""
  return _steps(tuple(dict(changes).items()), tuple(axes.items()))


def take_steps(changes, steps: int):
  """Make the first updates of a config; returns the states before and after each (on the host), the metrics of each."""
  made = steps_of(changes)
  return made.run(made.batches(steps))[:2]


# --- the step ---------------------------------------------------------------------------------------------------------

AT_ONCE = {**small.STILL, 'optimizer.warmup_steps': 0, 'optimizer.eps': 1e-3}

GOLDEN = {  # update -> loss, gradient norm, root mean square of the update
  1: (5.579262, 10.163113, 0.006254112),
  3: (4.980424, 3.768761, 0.004797277),
}


def test_the_first_updates_are_golden():
  states, pairs = take_steps(AT_ONCE, 3)
  for number, expected in GOLDEN.items():
    before, after = leaves(states[number - 1].params), leaves(states[number].params)
    update = np.concatenate([np.ravel(after[name].astype(np.float64) - before[name]) for name in after])
    found = pairs[number - 1]
    actual = found['loss'][0] / found['loss'][1], found['gradient_norm'][0], np.sqrt(np.mean(update**2))
    np.testing.assert_allclose(
      actual, expected, rtol=1e-4,
      err_msg=f'(loss, gradient norm, rms of the update) of update {number} are not what they were. Loss and gradient '
      'norm of update 1 change with the data, the corruption, the packing, the initial values, the model and the loss; '
      'its rms with the optimizer and the clipping; update 3 with any of them, or with how they follow each other. '
      'If the change is meant, every run so far trains differently from now on: say so in the commit, and put the new '
      'numbers here.',
    )  # fmt: skip
    np.testing.assert_allclose(found['update_norm'][0], np.linalg.norm(update), rtol=1e-5)


@pytest.mark.parametrize('parts', [2, 4])
def test_an_update_from_accumulated_parts_equals_that_of_the_whole_batch(parts):
  whole, whole_pairs = take_steps(AT_ONCE, 2)
  cut, cut_pairs = take_steps({**AT_ONCE, 'optimizer.accumulation_steps': parts}, 2)
  for a, b in zip(whole[1:], cut[1:], strict=True):
    for name, array in leaves(a.params).items():
      np.testing.assert_allclose(leaves(b.params)[name], array, rtol=0, atol=1e-6, err_msg=name)
  for a, b in zip(whole_pairs, cut_pairs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)


def test_each_accumulated_part_and_each_step_has_its_own_dropout():
  still = steps_of({**AT_ONCE, 'optimizer.accumulation_steps': 2})
  batch = still.batches(1)[0]
  twin = {name: np.repeat(array[::2], 2, axis=0) for name, array in batch.items()}  # both parts hold the same rows

  def losses(made):
    """The loss of the one part that has weight, part 0 and part 1, in two steps."""
    out = []
    for part in (0, 1):
      weight = twin['segment_weight_BxS'] * np.float32(np.arange(8) % 2 == part)[:, None]
      pairs = made.run([{**twin, 'segment_weight_BxS': weight}] * 2)[1]
      out += [float(pair['loss'][0]) for pair in pairs]
    return out

  first, _, second, _ = losses(still)
  np.testing.assert_allclose(first, second, rtol=1e-6)
  noise = {**AT_ONCE, 'optimizer.accumulation_steps': 2, 'model.dropout': 0.3, 'optimizer.learning_rate': 0.0}
  noisy = losses(steps_of(noise))
  assert len(set(noisy)) == 4, f'all the same but for the noise: {noisy}'
  assert losses(steps_of(noise)) == noisy  # which is a function of seed, step and part


# --- the optimizer ----------------------------------------------------------------------------------------------------

DECAYED = {
  'embed', 'unembed', 'stop/logits/kernel', 'stop/mlp_in/kernel', 'stop/mlp_out/kernel',
  'block_0/query/kernel', 'block_0/key/kernel', 'block_0/value/kernel', 'block_0/out/kernel',
  'block_0/mlp_in/kernel', 'block_0/mlp_out/kernel',
}  # fmt: skip


def test_weight_decay_is_for_everything_but_biases_and_norms():
  cfg = small.config({'optimizer.warmup_steps': 0})
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  ones, zeros = (jax.tree.map(lambda x, n=n: np.full_like(x, n), steps_of(AT_ONCE).start.params) for n in (1, 0))
  updates, _ = jax.jit(tx.update)(zeros, jax.jit(tx.init)(ones), ones)
  moved = {name: array for name, array in leaves(updates).items() if array.any()}
  assert set(moved) == DECAYED
  rest = set(leaves(updates)) - DECAYED
  assert len(rest) == 12 and all(name.endswith('bias') or '/norm' in name or 'final_norm' in name for name in rest)
  for array in moved.values():
    np.testing.assert_allclose(array, -1e-2 * 0.1, rtol=1e-6)  # learning rate times decay


def test_the_optimizer_is_clipped_adamw():
  cfg = small.config({'optimizer.warmup_steps': 2, 'optimizer.clip': 0.5, 'optimizer.schedule': 'linear', 'steps': 12})
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  expected = {name: array.copy() for name, array in params.items()}
  first = {name: np.zeros_like(array) for name, array in params.items()}
  second = {name: np.zeros_like(array) for name, array in params.items()}
  params = jax.tree.map(np.float32, params)
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(6):
    size = 10.0 ** -(step % 3)  # norms above and below the clip
    grads = {name: size * rng.normal(size=array.shape) for name, array in expected.items()}
    updates, state = update(jax.tree.map(np.float32, grads), state, params)
    params = jax.tree.map(np.add, params, updates)

    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    rate = 1e-2 * step / 2 if step < 2 else 1e-2 * (1 - (step - 2) / 10)
    for name, g in grads.items():
      g = g * min(1, 0.5 / norm)
      first[name] = 0.9 * first[name] + 0.1 * g
      second[name] = 0.98 * second[name] + 0.02 * g**2
      move = first[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.98 ** (step + 1))) + 1e-8)
      move = move + (0.1 * expected[name] if name == 'kernel' else 0)
      expected[name] = expected[name] - rate * move
    for name in expected:
      np.testing.assert_allclose(params[name], expected[name], rtol=2e-5, atol=1e-7, err_msg=f'{name}, step {step}')


@pytest.mark.parametrize('warmup', [0, 10])
@pytest.mark.parametrize('kind', ['constant', 'cosine', 'linear'])
def test_schedules_follow_their_formulas(kind, warmup):
  changes = {'schedule': kind, 'warmup_steps': warmup, 'learning_rate': 0.5, 'final_fraction': 0.2}
  cfg = small.config({f'optimizer.{name}': value for name, value in changes.items()})
  schedule = optimizer.make_schedule(cfg.optimizer, 110)
  for step in (0, 1, 5, 9, 10, 11, 40, 60, 100, 109, 110, 200):
    t = min(1.0, (step - warmup) / (110 - warmup))
    after = {
      'constant': 0.5,
      'linear': 0.5 + (0.1 - 0.5) * t,
      'cosine': 0.1 + (0.5 - 0.1) * (1 + np.cos(np.pi * t)) / 2,
    }[kind]
    expected = 0.5 * step / warmup if step < warmup else after
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7, err_msg=f'step {step}')


def test_the_moving_average_follows_its_ramp(alone):
  states, _ = alone
  average = leaves(states[0].params)
  for t in range(1, 4):
    decay = min(0.24, (1 + t) / (10 + t))  # 2/11, then 0.24
    for name, array in leaves(states[t].params).items():
      average[name] = decay * average[name] + (1 - decay) * array
    for name, array in leaves(states[t].ema_params).items():
      np.testing.assert_allclose(array, average[name], rtol=1e-5, atol=1e-7, err_msg=f'{name}, update {t}')
  exp, tx, schedule, state, _ = small.experiment({'optimizer.ema_decay': 0.0})
  after, _ = jax.eval_shape(train_step.make_step(exp, tx, schedule), state, small.batches(exp, 1)[0])
  assert state.ema_params is None and after.ema_params is None


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_add_as_totals_and_weights():
  total = {}
  for part in ({'loss': (3.0, 2.0)}, {'loss': (5.0, 1.0), 'rare': (1.0, 4.0)}, {'none': (0.0, 0.0)}):
    total = metrics.add(total, part)
  assert total == {'loss': (8.0, 3.0), 'rare': (1.0, 4.0), 'none': (0.0, 0.0)}
  assert metrics.means(total) == {'loss': 8.0 / 3.0, 'rare': 0.25}  # what was never measured has no mean


@pytest.mark.parametrize(
  'successes, trials, low, high',
  [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombe_1998(successes, trials, low, high):
  np.testing.assert_allclose(metrics.wilson(successes, trials), (low, high), atol=5e-5)


def test_a_proportion_is_written_for_people():
  assert metrics.wilson(0, 0) == (0.0, 1.0)
  assert metrics.percent(996, 1000) == '99.60 % (996 of 1000; 95 % interval 98.98 - 99.84)'


# --- the mesh ---------------------------------------------------------------------------------------------------------

AXES = {  # the logical axes of each parameter, written out once more
  'embed': 'vocab -', 'unembed': 'vocab -',
  'query/kernel': 'embed heads -', 'key/kernel': 'embed heads -', 'value/kernel': 'embed heads -',
  'out/kernel': 'heads - embed', 'mlp_in/kernel': 'embed mlp', 'mlp_in/bias': 'mlp',
  'mlp_out/kernel': 'mlp embed', 'mlp_out/bias': 'embed', 'logits/kernel': 'embed -',
  'scale': 'embed', 'bias': 'embed',
}  # fmt: skip
MESHES = [{'data': 8}, {'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 2, 'tensor': 4}]


def spell(axes) -> str:
  return ','.join(f'{name}={size}' for name, size in axes.items())


@pytest.mark.parametrize('axes', MESHES, ids=spell)
def test_the_loss_does_not_depend_on_the_mesh(axes, alone):
  made = steps_of(SHARED, **axes)
  states, pairs, _ = made.run(made.batches(3))
  assert_close_steps(pairs, alone[1])
  assert_same_bits(states[0], alone[0][0])


def assert_close_steps(pairs, expected):
  """The first loss to 1e-6, the first steps to 1e-5, later ones to 1e-4."""
  np.testing.assert_allclose(pairs[0]['loss'], expected[0]['loss'], rtol=1e-6)
  for step, (a, b) in enumerate(zip(expected, pairs, strict=True), 1):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(b[name], a[name], rtol=1e-5 if step <= 3 else 1e-4, err_msg=f'{name}, step {step}')


@pytest.mark.long
@pytest.mark.parametrize('changes', [SHARED, {**SHARED, **small.STILL}], ids=['dropout', 'still'])
@pytest.mark.parametrize('axes', MESHES, ids=spell)
def test_twenty_losses_do_not_depend_on_the_mesh(axes, changes):
  made, batches = steps_of(changes, **axes), steps_of(changes).batches(20)
  assert_close_steps(made.run(batches)[1], steps_of(changes).run(batches)[1])


@pytest.mark.parametrize('axes', MESHES, ids=spell)
def test_the_state_and_the_batch_lie_where_the_table_says(axes):
  made = steps_of(SHARED, **axes)
  data, fsdp, tensor = (axes.get(name, 1) for name in ('data', 'fsdp', 'tensor'))
  ways = {'-': 1, 'vocab': fsdp * tensor, 'embed': fsdp, 'heads': tensor, 'mlp': tensor}

  def expected(name, shape):
    """The part of an array that each device holds."""
    keys = [key for key in AXES if name.endswith(key)]
    if not keys:
      assert name.endswith(('count', 'step')) and shape == ()
      return ()
    return tuple(n // ways[axis] for n, axis in zip(shape, AXES[max(keys, key=len)].split(), strict=True))

  batch = made.batches(1)[0]
  after = made.run([batch])[2]
  for state in (made.state, after):
    arrays = 0
    for path, array in jax.tree_util.tree_flatten_with_path(state)[0]:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      assert {shard.data.shape for shard in array.addressable_shards} == {expected(name, array.shape)}, name
      assert len(array.sharding.device_set) == 8, name
      arrays += array.ndim > 0
    assert arrays == 4 * 23  # the parameters, two moments, the average
  for name, array in sharding.put_batch(batch, made.exp.mesh).items():
    shape = (8 // (data * fsdp), *batch[name].shape[1:])
    assert {shard.data.shape for shard in array.addressable_shards} == {shape}, name


def test_an_axis_that_does_not_divide_is_not_cut():
  spec = sharding.spec_of(('vocab', None), (20, 16), small.mesh(2, 2, 2))
  assert spec == jax.sharding.PartitionSpec(('tensor', 'fsdp'), None)
  assert sharding.spec_of(('vocab', None), (17, 16), small.mesh(2, 2, 2))[0] is None
  wide = small.mesh(fsdp=2, tensor=4)
  assert [sharding.spec_of(('vocab', None), (size, 16), wide)[0] for size in (12, 18)] == ['tensor', 'fsdp']


def test_a_loop_over_blocks_that_are_computed_again_does_not_depend_on_the_mesh():
  changes = {**SHARED, 'model.num_layers': 2}
  made = steps_of({**changes, 'model.scan_layers': True, 'model.remat': True}, data=2, fsdp=2, tensor=2)
  batches = made.batches(3)
  assert_close_steps(made.run(batches)[1], steps_of(changes).run(batches)[1])


@pytest.mark.parametrize('family, parts', [('ilm', 2), ('arm', 1), ('it', 1), ('mdm', 1)])
def test_every_family_and_accumulated_parts_train_on_a_mesh_as_on_one_device(family, parts):
  changes = {**SHARED, 'family': family, 'data.rows': 16, 'optimizer.accumulation_steps': parts}
  made = steps_of(changes, data=2, fsdp=2, tensor=2)
  batches = made.batches(3)
  assert_close_steps(made.run(batches)[1], steps_of(changes).run(batches)[1])


def evaluator_of(exp):
  return evaluate.Evaluator(
    exp.cfg, model_cfg=exp.model_cfg, family=exp.family, task=exp.task, sample_cfg=exp.sample_cfg,
    loss_cfg=exp.loss_cfg, mesh=exp.mesh,
  )  # fmt: skip


def test_an_evaluation_does_not_depend_on_the_mesh_nor_must_its_batch_divide():
  found = []
  for axes in ({}, {'data': 2, 'fsdp': 2, 'tensor': 2}):
    changes = {**SHARED, 'eval.batch_size': 3, 'eval.score': 'bound', 'task.num_test': 7}
    exp, *_, state, _ = small.experiment(changes, **axes)
    made = evaluator_of(exp)
    found.append((made.likelihood(state.params, 'test'), made.answers(state.params, 'test')))
  for one, other in zip(found[0][0][1:], found[1][0][1:], strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5)
  assert found[0][1].texts == found[1][1].texts


def test_the_papers_star_graphs_fit_the_eight_devices_of_a_host():
  exp = build(star.get_config('hard'), devices=jax.devices())
  assert exp.mesh.size == 8


def test_programs_know_their_mesh():
  """Without `sharding.on` the numbers would be the same, and the weights perhaps not gathered but the features."""
  exp, tx, schedule, state, abstract = small.experiment({**SHARED, 'eval.score': 'bound'}, data=2, fsdp=2, tensor=2)
  batch = sharding.put_batch(small.batches(exp, 1)[0], exp.mesh)
  evaluator = evaluator_of(exp)
  rows = {'tokens_BxL': jnp.ones((8, 6), int), 'fixed_BxL': jnp.zeros((8, 6), bool), 'length_B': jnp.full(8, 6)}
  key, prompt = jax.random.key(0), static_batching.pad([], [], 8, 32)
  sampler = continuous_batching.ContinuousSampler(exp.model_cfg, exp.family, exp.sample_cfg, 8, mesh=exp.mesh)
  lowered = {
    'step': train_step.compile_step(exp, tx, schedule, abstract).lower(state, batch),
    'loss': evaluator._loss.lower(state.params, batch),
    'likelihood': evaluator._score.lower(state.params, key, rows),
    'sampler': evaluator.sampler._run.lower(state.params, key, prompt),
    'advance': sampler.lower(state.params, key, 8),
  }
  for name, program in lowered.items():
    assert 'sharding_constraint' in program.as_text(), name


@pytest.mark.parametrize('sizes', [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_names_the_sizes_that_do(sizes):
  cfg = dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
  with pytest.raises(UserError, match=r'does not fit 8 device.*one of 1, 2, 4, 8, or -1') as error:
    sharding.make_mesh(cfg, jax.devices())
  assert f'mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}' in str(error.value)


def test_only_data_goes_between_slices():
  devices = [SimpleNamespace(id=i, platform='tpu', slice_index=i // 4 % 2) for i in (4, 5, 6, 7, 0, 1, 2, 3)]
  assert [[device.id for device in part] for part in sharding.slices_of(devices)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  gpus = [SimpleNamespace(id=i, platform='gpu', slice_index=i // 4) for i in range(8)]
  assert len(sharding.slices_of(gpus)) == 1  # hosts, to JAX: fsdp may span them


def test_the_rows_of_a_host_are_in_one_piece():
  def torus(side):  # hosts of 2 x 2 chips; a ring through all the chips, as a mesh follows the links
    chips = [(x, y if x % 2 == 0 else side - 1 - y) for x in range(side) for y in range(side)]
    return np.array([SimpleNamespace(process_index=x // 2 * side // 2 + y // 2, at=(x, y)) for x, y in chips])

  for shape in ((16, 1, 1), (1, 16, 1), (4, 4, 1), (4, 2, 2)):
    found = sharding.by_host(torus(4).reshape(shape))
    assert found.shape == shape and len({device.at for device in found.ravel()}) == 16
    first = [min(device.process_index for device in row) for row in found.reshape(-1, shape[-1])]
    assert first == sorted(first)
  hosts = [device.process_index for device in sharding.by_host(torus(4).reshape(16, 1, 1)).ravel()]
  assert hosts == sorted(hosts)


def test_a_mesh_of_two_slices_keeps_fsdp_and_tensor_within_one(monkeypatch):
  devices = jax.devices()
  monkeypatch.setattr(sharding, 'slices_of', lambda devices: [devices[1::2], devices[::2]])
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, devices)
  ids = np.vectorize(lambda device: device.id)(mesh.devices)
  assert [set(part.ravel().tolist()) for part in ids] == [{1, 3, 5, 7}, {0, 2, 4, 6}]
  assert dict(mesh.shape) == dict(small.mesh(2, 2, 2).shape)
  with pytest.raises(UserError, match=r'on 2 slices, between which only mesh.data may go: make it a multiple of 2'):
    sharding.make_mesh({'data': 1, 'fsdp': 8, 'tensor': 1}, devices)


@pytest.mark.parametrize('sizes', [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_a_mesh_that_makes_no_sense_says_what_was_expected(sizes):
  with pytest.raises(UserError, match='at least 1, at most one of them -1'):
    sharding.make_mesh(dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)), jax.devices())


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data.rows': 12}, r'data.rows=12 does not divide over 8 devices .*: use 8 or 16'),
    ({'data.rows': 4}, r'data.rows=4 does not divide over 8 devices .*: use 8$'),
    (
      {'data.rows': 8, 'optimizer.accumulation_steps': 3},
      r'data.rows=8 .*optimizer.accumulation_steps=3 parts: use data.rows=6 or 9',
    ),
    (
      {'data.rows': 8, 'optimizer.accumulation_steps': 2},
      r'data.rows / optimizer.accumulation_steps=4 does not divide over 8',
    ),
    ({'data.groups': 3}, r'data.batch_size=16 is not a multiple of data.groups=3: use data.batch_size=15 or 18'),
    ({'data.groups': 16}, r'data.rows=8 is not a multiple of data.groups=16: use data.rows=16'),
    ({'data.row_length': 20}, r'data.row_length=20 is shorter than the longest example, 22 tokens'),
    ({'optimizer.accumulation_steps': 0}, r'optimizer.accumulation_steps=0: expected at least 1'),
    ({'optimizer.schedule': 'step'}, r"optimizer.schedule='step': expected one of constant, cosine, linear"),
    ({'eval.mode': 'most'}, r"eval.mode='most': expected max or min"),
    ({'seed': -1}, r'seed=-1: expected'),
    ({'family': 'gpt'}, r"config.family='gpt': expected one of ilm"),
    ({'model.d_model': 15}, r'model.d_model=15 is not a multiple of model.num_heads=2'),
    ({'task.num_nodes': 5}, r'task.num_nodes=5: 2 arms of 4 nodes need 7 names'),
  ],
  ids=lambda value: spell(value) if isinstance(value, dict) else '',
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    loop.train(small.config(changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


# --- the loop ---------------------------------------------------------------------------------------------------------


class Crash(Exception):
  """Stands for what ends a process."""


def crash_at(monkeypatch, number: int, change=None):
  """Let the step after `number` fail, or change its result."""
  compiled = train_step.compile_step

  def compile_step(*args):
    run = compiled(*args)

    def step(state, batch):
      if int(state.step) == number:
        if change is None:
          raise Crash
        return change(*run(state, batch))
      return run(state, batch)

    return step

  monkeypatch.setattr(loop, 'compile_step', compile_step)


LOGGED = {'log_every': 1, 'checkpoint_every': 5, 'eval.every': 10, 'steps': 20}


@pytest.fixture(scope='module')
def restarted(tmp_path_factory):
  """A run of 20 steps that broke in step 18, after its checkpoint of step 15, and was started again."""
  workdir = tmp_path_factory.mktemp('restarted') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    with pytest.MonkeyPatch.context() as broken:
      crash_at(broken, 17)
      with pytest.raises(Crash):
        loop.train(small.config(LOGGED), workdir)
    written = logs.read_scalars(workdir)['train/loss']
    assert [step for step, _ in written] == list(range(1, 18)), 'steps 16 and 17 are to be replayed'
    assert loop.train(small.config(LOGGED), workdir) == loop.FINISHED
  return workdir


TRAIN_TAGS = {
  'loss', 'token_loss', 'stop_loss', 'stop_accuracy', 'learning_rate', 'gradient_norm', 'update_norm', 'epoch',
  'kept_tokens_per_second', 'original_tokens_per_second', 'input_wait', 'packing_efficiency', 'left_out_examples',
}  # fmt: skip
VALIDATION_TAGS = {'loss', 'token_loss', 'stop_loss', 'exact_match', 'token_accuracy', 'stopped', 'length'}


def test_event_files_hold_every_step_once_after_a_restart(restarted):
  assert len(list(restarted.glob('events.out.tfevents.*'))) == 2
  scalars = logs.read_scalars(restarted)
  for name in TRAIN_TAGS:
    assert [step for step, _ in scalars[f'train/{name}']] == list(range(1, 21)), name
  for name in VALIDATION_TAGS:
    assert [step for step, _ in scalars[f'validation/{name}']] == [10, 20], name


def test_event_files_hold_what_the_steps_gave(restarted):
  _, pairs = take_steps({}, 20)
  scalars = logs.read_scalars(restarted)
  for name in ('loss', 'token_loss', 'stop_loss', 'gradient_norm', 'packing_efficiency'):
    expected = [pair[name][0] / pair[name][1] for pair in pairs]
    np.testing.assert_allclose([value for _, value in scalars[f'train/{name}']], expected, rtol=1e-5, err_msg=name)
  rates = [1e-2 * min(1, step / 4) for step in range(20)]
  np.testing.assert_allclose([value for _, value in scalars['train/learning_rate']], rates, rtol=1e-5)
  np.testing.assert_allclose([value for _, value in scalars['train/epoch']], [n * 16 / 200 for n in range(1, 21)])
  kept, original = (
    np.array([v for _, v in scalars[f'train/{name}_tokens_per_second']]) for name in ('kept', 'original')
  )
  expected = [pair['kept_tokens'][0] / pair['original_tokens'][0] for pair in pairs]
  np.testing.assert_allclose(kept / original, expected, rtol=1e-5)
  assert all(0 <= value <= 1 for _, value in scalars['train/input_wait'])


def test_event_files_hold_samples_and_hyperparameters(restarted):
  events = [e for path in sorted(restarted.glob('events*')) for e, _ in logs.read_records(path)]
  texts = [(e.step, v.tensor.string_val[0].decode()) for e in events for v in e.summary.value if 'samples' in v.tag]
  assert [step for step, _ in texts] == [10, 20]
  assert all(re.search(r'(right|wrong)  \d+,\d+\|.*/\d+,\d+=', text) for _, text in texts)
  plugins = [v.metadata.plugin_data for e in events for v in e.summary.value]
  plugins = [plugin for plugin in plugins if plugin.plugin_name == 'hparams']
  assert len(plugins) == 3  # an experiment, a start, an end: once, though the run started twice
  assert any(b'optimizer.learning_rate' in plugin.content for plugin in plugins)


def test_run_json_says_what_was_run(restarted):
  found = json.loads((restarted / 'run.json').read_text())
  cfg = small.config(LOGGED)
  assert found['config'] == json.loads(cfg.to_json_best_effort())
  assert [start['from_step'] for start in found['starts']] == [0, 15]
  for start in found['starts']:
    assert re.fullmatch(r'[0-9a-f]{40}(\+changes)?|unknown', start['commit'])
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}', start['time'])
    assert start['command'].startswith('python -m ilm_jax.main')
    assert start['devices'].startswith('8 x ') and start['processes'] == 1
    assert start['versions'].keys() == set(run_file.PACKAGES)
    assert start['versions']['jax'] == jax.__version__


def test_eval_json_holds_the_test_result(restarted):
  found = json.loads((restarted / 'eval.json').read_text())
  assert found['split'] == 'test' and found['seed'] == 0 and found['step'] in (10, 20)
  right, of = found['pairs']['exact_match']
  assert of == 8 and found['metrics']['exact_match'] == right / of


def test_another_run_starts_from_the_averaged_weights(restarted, tmp_path, one_device):
  cfg = small.config({'init_from': str(restarted), 'seed': 3})
  *_, state, abstract = small.experiment({'seed': 3})
  started = loop.start_from(cfg.init_from, state, abstract)
  source = checkpoint.Checkpoints(restarted, read_only=True)
  average = source.restore(20, 'ema_params', abstract.ema_params)
  assert_same_bits(started.params, average)
  assert_same_bits(started.ema_params, average)
  assert int(started.step) == 0 and not any(array.any() for array in leaves(started.opt_state).values())
  assert any(not np.array_equal(a, b) for a, b in zip(leaves(source.restore(20, 'params', abstract.params)).values(),
                                                    leaves(average).values(), strict=True))  # fmt: skip
  seen = []

  def look(loop, state, start):
    seen.append((state, start))
    return loop.PREEMPTED

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Loop, 'run', look)
    assert loop.train(cfg, tmp_path / 'run') == loop.PREEMPTED
  assert seen[0][1] == 0
  assert_same_bits(seen[0][0].params, average)


# --- what stops a run -------------------------------------------------------------------------------------------------


def finite(workdir, exp, abstract) -> dict[int, bool]:
  """Step -> is every number of its checkpoint finite?"""
  saved = checkpoint.Checkpoints(workdir, read_only=True)
  out = {}
  for step in saved.steps():
    items = [leaves(saved.restore(step, name, getattr(abstract, name))) for name in checkpoint.ITEMS]
    out[step] = all(np.isfinite(array).all() for item in items for array in item.values())
  return out


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch, one_device):
  changes = {**LOGGED, 'eval.every': 0}

  def spoil(state, pairs):
    return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)), pairs

  crash_at(monkeypatch, 6, spoil)
  with pytest.raises(UserError, match=r'step 8: the loss is nan.* the last complete checkpoint is step 5 ') as error:
    loop.train(small.config(changes), tmp_path)
  assert str(tmp_path) in str(error.value)
  abstract = steps_of().abstract
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps() == [5]
  for array in leaves(saved.restore_latest(abstract)).values():
    assert np.isfinite(array).all()
  assert [step for step, _ in logs.read_scalars(tmp_path)['train/loss']] == list(range(1, 8))  # all is on disk


@pytest.mark.parametrize(
  'changes, update', [({'optimizer.eps': 0.0}, 'nan'), ({'optimizer.learning_rate': 1e30}, 'inf')], ids=['0/0', '1e30']
)
def test_an_update_that_is_not_finite_is_never_saved(changes, update, tmp_path, one_device):
  changes = {**LOGGED, 'log_every': 0, 'checkpoint_every': 1, 'optimizer.warmup_steps': 0, **changes}
  with pytest.raises(UserError, match=rf'step 1: the loss is \d.* of the update {update}: there is no complete'):
    loop.train(small.config(changes), tmp_path)
  assert not list(tmp_path.glob('checkpoints/*'))


def test_event_files_that_cannot_be_written_end_the_run_in_one_line(tmp_path, monkeypatch, one_device):
  write = logs.SummaryWriter._write

  def full(self, step, summary):
    if step > 7:
      raise OSError(28, 'No space left on device')
    write(self, step, summary)

  monkeypatch.setattr(logs.SummaryWriter, '_write', full)
  expected = (
    rf'the event files in {tmp_path} could not be written .*No space.* the last complete checkpoint is step 5; ma'
  )
  with pytest.raises(UserError, match=expected):
    loop.train(small.config(LOGGED), tmp_path)


@pytest.mark.parametrize('name', ['run.json', 'eval.json'])
def test_a_file_of_the_run_that_cannot_be_written_is_named_in_one_line(name, tmp_path, monkeypatch, one_device):
  write = run_file.write_json

  def full(path, value):
    if path.name == name:
      raise OSError(28, 'No space left on device')
    write(path, value)

  monkeypatch.setattr(logs, 'write_json', full)
  with pytest.raises(
    UserError, match=rf'{tmp_path} could not be written \(No space left on device\): make room and start'
  ):
    loop.train(small.config({'steps': 5}), tmp_path)


def test_a_metric_that_is_not_measured_is_named(tmp_path, one_device):
  with pytest.raises(UserError, match=r"eval.metric='bleu' is not measured: expected one of exact_match, .*token_loss"):
    loop.train(small.config({**LOGGED, 'eval.metric': 'bleu'}), tmp_path)


def planned(monkeypatch, values):
  """Let the exact matches on validation be `values`, evaluation by evaluation."""
  plan = iter(values)

  def answers(self, params, split, **_):
    return evaluate.Scores({'exact_match': (next(plan) if split == 'validation' else 0.5, 1.0)}, ['an answer'])

  monkeypatch.setattr(evaluate.Evaluator, 'answers', answers)


def test_a_run_stops_at_its_goal_and_remembers_it(tmp_path, monkeypatch, one_device):
  changes = {'eval.every': 10, 'eval.mode': 'min', 'steps': 40, 'stop_at': 2.0}
  planned(monkeypatch, [4.0, 3.0, 2.0])
  assert loop.train(small.config(changes), tmp_path) == loop.FINISHED
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps()[-1] == 30
  assert json.loads((tmp_path / 'eval.json').read_text())['step'] == 30
  planned(monkeypatch, [])  # not evaluated again
  monkeypatch.setattr(loop.Loop, 'save', None)  # nor saved
  assert loop.train(small.config(changes), tmp_path) == loop.FINISHED


def test_the_best_checkpoint_stays_and_is_tested_also_after_a_restart(tmp_path, monkeypatch, one_device):
  changes = {'eval.every': 10, 'steps': 40}
  planned(monkeypatch, [0.1, 0.5, 0.3, 0.2])
  with pytest.MonkeyPatch.context() as broken:
    crash_at(broken, 33)
    with pytest.raises(Crash):
      loop.train(small.config(changes), tmp_path)
  assert loop.train(small.config(changes), tmp_path) == loop.FINISHED
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps() == [20, 35, 40]  # the best and the latest two
  assert saved.metrics(20)['exact_match'] == 0.5 and saved.metrics(35) is None
  assert json.loads((tmp_path / 'eval.json').read_text())['step'] == 20
