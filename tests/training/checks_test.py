"""Checks of a config before a run begins: names of settings, ranges of numbers, memory."""

import math

import pytest
import small
from ml_collections import ConfigDict

from ilm_jax.configs import default, lm1b, star, text, zebra
from ilm_jax.runs.run_file import as_json, flatten, unflatten
from ilm_jax.training import checks
from ilm_jax.types import UserError


def refused(cfg, message: str) -> None:
  """Assert that a config is refused with exactly this message."""
  with pytest.raises(UserError) as error:
    checks.check_settings(cfg)
  assert str(error.value) == message


def extended(settings) -> ConfigDict:
  """Return the config of the small run with `settings`, valid or not, added or replaced."""
  return ConfigDict(unflatten({**flatten(as_json(small.config())), **settings}))


def numbers(cfg) -> dict:
  """Return the settings of a config that are numbers, except those of its task."""
  values = {name: value for name, value in flatten(as_json(cfg)).items() if not name.startswith('task.')}
  return {name: value for name, value in values.items() if type(value) in (int, float)}


def test_every_numeric_setting_of_the_packaged_configs_has_a_range_that_contains_its_value():
  ranges = {'seed', *(name for _, _, names in checks.RANGES for name in names)}
  for module in (star, text, zebra, lm1b):
    for variant in module.VARIANTS:
      cfg = module.get_config(variant)
      assert {name for name in numbers(cfg) if not name.startswith('sampling.')} <= ranges
      checks.check_settings(cfg)


def test_a_number_that_is_not_finite_is_refused_in_every_setting():
  for name, value in numbers(small.config()).items():
    if isinstance(value, float):
      for bad in (math.nan, math.inf, -math.inf):
        if bad != math.inf or name not in ('optimizer.clip', 'report_seconds'):
          with pytest.raises(UserError, match=rf'^{name}={bad}: expected a finite number$'):
            checks.check_settings(small.config({name: bad}))
  checks.check_settings(small.config({'optimizer.clip': math.inf, 'report_seconds': math.inf}))


@pytest.mark.parametrize(
  ('name', 'value', 'allowed'),
  [
    ('optimizer.learning_rate', -1.0, 'at least 0'),
    ('optimizer.ema_decay', 2.0, 'a number of at least 0 and below 1'),
    ('optimizer.b1', 2.0, 'a number of at least 0 and below 1'),
    ('optimizer.b2', 1.0, 'a number of at least 0 and below 1'),
    ('optimizer.eps', -1e-8, 'at least 0'),
    ('optimizer.weight_decay', -0.1, 'at least 0'),
    ('optimizer.final_fraction', 1.5, 'a number from 0 to 1'),
    ('model.dropout', 1.0, 'a number of at least 0 and below 1'),
    ('model.num_layers', 0, 'at least 1'),
    ('corrupt.eos_weight', -1.0, 'at least 0'),
    ('mesh.data', 0, '-1 or at least 1'),
    ('data.num_workers', 100_000, 'a whole number from 0 to 1024'),
    ('seed', 2**32, 'an integer from 0 to 4294967295'),
    ('task.seed', 2**32, 'an integer from 0 to 4294967295'),
    ('task.num_test', 10**12, 'a whole number from 1 to 1,000,000'),
    ('task.num_train', 2**63, 'at least 0 and below 2**62'),
    ('steps', 2**31, 'a number below 2**31'),
  ],
)
def test_a_number_out_of_its_range_is_refused(name, value, allowed):
  refused(small.config({name: value}), f'{name}={value}: expected {allowed}')


def test_a_string_in_place_of_a_number_is_refused():
  cfg = small.config()
  with cfg.ignore_type():
    cfg.optimizer.learning_rate = '1e-3'
  refused(cfg, "optimizer.learning_rate='1e-3': expected at least 0")


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('stpes', 'did you mean config.steps?'),
    ('famly', 'did you mean config.family?'),
    ('optimizer.warmup_step', 'did you mean config.optimizer.warmup_steps?'),
    ('warmup_steps', 'did you mean config.optimizer.warmup_steps?'),
    ('optimzer.eps', 'did you mean config.optimizer.eps?'),
    ('sampling.token.temprature', 'did you mean config.sampling.token.temperature?'),
    ('task.min_lenght', 'did you mean config.task.min_length?'),
    ('mesh.xyz', 'expected one of mesh.data, mesh.fsdp, mesh.tensor'),
  ],
)
def test_a_mistyped_setting_of_a_config_file_is_refused_with_the_closest_name(name, message):
  refused(extended({name: 1}), f'config.{name} is not a setting: {message}')


def test_families_and_tasks_outside_the_package_may_add_settings():
  own = {'corrupt.my_rate': 0.5, 'my_family.width': 8, 'sampling.beam': 4}
  checks.check_settings(extended({**own, 'family': 'my_family'}))
  refused(extended(own), 'config.corrupt.my_rate is not a setting: did you mean config.corrupt.fim_rate?')
  for wrong in ('optimizer.warmup_step', 'stpes'):
    with pytest.raises(UserError, match=f'config.{wrong} is not a setting: did you mean'):
      checks.check_settings(extended({**own, 'family': 'my_family', wrong: 1}))
  checks.check_settings(extended({'task.digits': 5, 'task.name': 'my_task', 'data.path': 'x'}))


def test_a_section_that_a_config_file_replaces_must_be_complete():
  cfg = small.config()
  with cfg.unlocked():
    cfg.mesh = ConfigDict({'data': 1, 'fsdp': 1})
  advice = 'start from ilm_jax.configs.default.get_config(), which has it'
  refused(cfg, f'config.mesh.tensor is missing: {advice}')
  cfg = small.config()
  with cfg.unlocked():
    cfg.sampling.token = ConfigDict({'temperature': 0.7})
    cfg.model = ConfigDict({'preset': 'tiny'})
  checks.check_settings(cfg)
  message = 'config.task.name is missing: expected one of star, zebra, text, or the import path of a module'
  refused(default.get_config(), message)


# --- memory -----------------------------------------------------------------------------------------------------------

# Weights of the small run: one block of 4 matrices 16 x 16 and 2 of 16 x 32, and 2 tables of 17 x 16; five copies (the
# weights, gradients, two moments, average) of 4 bytes per number.
STATE = 5 * 4 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 17 * 16)
BLOCKS = 8 * 44 * 16 * 4  # the input of one block: 8 rows of 44 positions, 16 channels of 4 bytes
SAMPLER = 8 * 22 * 16  # 8 rows of 22 positions: token, order and two probabilities, 4 bytes each
# Two batches of 8 rows: 44 positions of 13 bytes, 88 targets of 16 bytes and 3 segments of 24 bytes.
BATCHES = 2 * 8 * (44 * 13 + 88 * 16 + 3 * 24)
EXAMPLES = 16 * 500


@pytest.mark.parametrize('spare', [-1, 0])
def test_a_run_that_needs_more_memory_than_its_host_has_is_refused(spare, monkeypatch):
  exp, *_ = small.uninitialized()
  on_devices = 8 * (STATE + BLOCKS + SAMPLER)  # all 8 CPU devices use the memory of the host
  monkeypatch.setattr(checks.memory, 'host_memory', lambda: on_devices + BATCHES + EXAMPLES + spare)
  if spare < 0:
    with pytest.raises(UserError, match=r'^model.num_layers=1, d_model=16, d_ff=32: the run needs at least 0.0 GB'):
      checks.check_memory(exp, training=True)
  else:
    checks.check_memory(exp, training=True)
