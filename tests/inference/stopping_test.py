"""Stopping rules: one run that never stops tells where each rule would have ended."""

import jax
import numpy as np
import pytest
import small

from ilm_jax.inference import api, stopping
from ilm_jax.inference.continuous_batching import ContinuousSampler
from ilm_jax.inference.static_batching import prompt_of
from ilm_jax.types import UserError

STOPS = [np.array(stop, np.float32) for stop in ([0.1, 0.6, 0.2, 0.9], [0.3, 0.3], [0.95, 0.1, 0.1])]


def test_a_row_ends_where_its_probability_reaches_the_threshold():
  made = stopping.at_threshold(STOPS, 0.5, longest=3)
  assert made.prob_BxL.argmax(axis=1).tolist() == [1, 1, 0] and made.limit.tolist() == [0, 1, 0]
  assert made.mean() == pytest.approx(2 / 3)
  assert stopping.at_threshold(STOPS, 0.92, longest=3).prob_BxL.argmax(axis=1).tolist() == [3, 1, 0]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_sampled_stops_are_those_of_a_simulation(temperature):
  rng, made = np.random.default_rng(0), stopping.sampled(STOPS, temperature, longest=3)
  np.testing.assert_allclose(made.prob_BxL.sum(axis=1), 1)
  for i, stop in enumerate(STOPS):
    counts, cut = np.zeros(4), 0
    for _ in range(4_000):
      for at, p in enumerate(stop):  # noqa: B007
        logit = np.log(p / (1 - p)) / temperature
        if rng.random() < 1 / (1 + np.exp(-logit)):
          break
      else:
        cut += 1
      counts[at] += 1
    np.testing.assert_allclose(made.prob_BxL[i], counts / 4_000, atol=0.03)
    assert abs(made.limit[i] - cut / 4_000) < 0.03


def test_the_distance_is_the_mean_shift_of_matched_lengths():
  real = np.arange(100)
  lengths = np.zeros((100, 140))
  lengths[np.arange(100), np.arange(100) + 30] = 1
  made = stopping.Lengths('', '', lengths, np.zeros(100))
  assert made.distance(real) == pytest.approx(30, abs=0.5) and made.mean() == pytest.approx(79.5)


def test_the_fitted_rule_recovers_a_threshold_and_a_temperature():
  rng = np.random.default_rng(1)
  stops = [rng.random(20).astype(np.float32) ** 2 for _ in range(400)]
  real = stopping.at_threshold(stops, 0.7, longest=19).prob_BxL.argmax(axis=1)
  *_, threshold, _ = stopping.rules_of(stops, real)
  assert 0.65 < float(threshold.flag.split('=')[1]) < 0.75 and 'fitted' in threshold.rule
  warm = stopping.sampled(stops, 2.0, longest=19).prob_BxL.mean(axis=0)
  real = rng.choice(20, 20_000, p=warm / warm.sum())
  assert 1.7 < float(stopping.rules_of(stops, real)[-1].flag.split('=')[-1]) < 2.3


@pytest.fixture(scope='module')
def lm():
  exp, _, _, state, _ = small.experiment(
    {'task.num_validation': 40, 'sampling.max_length': 30, 'sampling.max_steps': None}
  )
  params = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), state.params)
  return api.LanguageModel(
    exp.cfg, exp.model_cfg, params, batch_size=8, min_buffer=32, stop_temperature=20.0, token={}, gap={}
  )


@pytest.mark.parametrize('share', [0.9])
def test_lengths_told_from_one_run_are_those_of_sampling_with_the_threshold(lm, share):
  source = lm.task.source(lm.cfg.task, 'validation')
  prompts = [prompt_of(source[i]) for i in range(40)]
  stops = stopping.trajectories(lm, prompts)
  own = [stopping.warm(stop, lm.sample_cfg.stop_temperature) for stop in stops]
  threshold = float(np.quantile(np.concatenate(own), share))
  told = stopping.at_threshold(own, threshold, longest=30)
  cfg = lm.sample_cfg._replace(stop_threshold=threshold)
  rows = dict(ContinuousSampler(lm.model_cfg, lm.family, cfg, 8)(lm.params, jax.random.key(0), prompts))
  made = [int((rows[i]['order'] >= 0).sum()) for i in range(40)]
  assert told.prob_BxL.argmax(axis=1).tolist() == made
  assert (told.limit == 0).tolist() == [rows[i]['stopped'] for i in range(40)]
  assert len(set(made)) > 3


def test_sampled_lengths_told_from_one_run_are_those_of_sampling(lm):
  source = lm.task.source(lm.cfg.task, 'validation')
  prompts = [prompt_of(source[i % 40]) for i in range(200)]
  told = stopping.sampled(stopping.trajectories(lm, prompts), 20.0, longest=30)
  cfg = lm.sample_cfg._replace(stop_threshold=None)
  rows = ContinuousSampler(lm.model_cfg, lm.family, cfg, 40)(lm.params, jax.random.key(0), prompts)
  made = [int((row['order'] >= 0).sum()) for _, row in rows]
  assert abs(told.mean() - np.mean(made)) < 4 * np.std(made) / 200**0.5


def test_several_insertions_a_step_and_a_forced_first_are_minded(lm, monkeypatch):
  prompt = prompt_of(lm.task.source(lm.cfg.task, 'validation')[0])
  monkeypatch.setattr(lm, 'sample_cfg', lm.sample_cfg._replace(force_first=True))
  assert stopping.trajectories(lm, [prompt])[0][0] == 0
  monkeypatch.setattr(lm, 'sample_cfg', lm.sample_cfg._replace(gaps=3))
  with pytest.raises(UserError, match='told for one insertion a step'):
    stopping.trajectories(lm, [prompt])


def test_the_command_prints_the_rules_and_refuses_other_families(lm, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(api, 'load', lambda *_, **__: lm)
  code = stopping.main(['stopping', '--workdir=run', '--count=10', f'--plot={tmp_path / "plot.png"}'])
  out = capsys.readouterr().out
  assert code == 0 and (tmp_path / 'plot.png').stat().st_size > 1_000
  assert 'real texts' in out and out.count('(fitted)') == 2 and 'fitted: --config.sampling.stop_threshold=' in out
  monkeypatch.setattr(lm, 'sample_cfg', object())
  assert stopping.main(['stopping', '--workdir=run']) == 1
  assert 'has no stop head' in capsys.readouterr().err
  assert stopping.main(['stopping']) == 1 and '--workdir is missing' in capsys.readouterr().err
