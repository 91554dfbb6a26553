"""Stopping rules: lengths predicted from unstopped samples equal the lengths of samples that each rule stops."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from ilm_jax.inference import api, continuous_batching, stopping
from ilm_jax.inference.static_batching import prompt_of
from ilm_jax.types import UserError

STOPS = [np.array(stop, np.float32) for stop in ([0.1, 0.6, 0.2, 0.9], [0.3, 0.3], [0.95, 0.1, 0.1])]


def test_a_sample_ends_where_its_stop_probability_reaches_the_threshold():
  rule = stopping.at_threshold(STOPS, 0.5, longest=3)
  assert rule.prob_BxL.argmax(axis=1).tolist() == [1, 1, 0] and rule.limit.tolist() == [0, 1, 0]
  assert rule.mean() == pytest.approx(2 / 3)
  assert stopping.at_threshold(STOPS, 0.92, longest=3).prob_BxL.argmax(axis=1).tolist() == [3, 1, 0]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_predicted_lengths_for_sampled_stopping_match_a_simulation(temperature):
  rng, rule, n = np.random.default_rng(0), stopping.sampled(STOPS, temperature, longest=3), 4_000
  np.testing.assert_allclose(rule.prob_BxL.sum(axis=1), 1, rtol=1e-9)
  for i, stop in enumerate(STOPS):
    stops_here = rng.random((n, len(stop))) < 1 / (1 + np.exp(-np.log(stop / (1 - stop)) / temperature))
    at_limit = ~stops_here.any(axis=1)
    lengths = np.where(at_limit, len(stop) - 1, stops_here.argmax(axis=1))
    np.testing.assert_allclose(rule.prob_BxL[i], np.bincount(lengths, minlength=4) / n, rtol=0, atol=0.03)
    assert abs(rule.limit[i] - at_limit.mean()) < 0.03


def test_the_distance_between_length_distributions_is_the_mean_difference_of_sorted_lengths():
  lengths_BxL = np.zeros((100, 140))
  lengths_BxL[np.arange(100), np.arange(100) + 30] = 1
  rule = stopping.Lengths('', '', lengths_BxL, np.zeros(100))
  assert rule.distance(np.arange(100)) == pytest.approx(30, abs=0.5) and rule.mean() == pytest.approx(79.5)


def test_fitting_recovers_the_stop_threshold_and_the_stop_temperature_of_the_data():
  rng = np.random.default_rng(1)
  stops = [rng.random(20).astype(np.float32) ** 2 for _ in range(400)]
  real = stopping.at_threshold(stops, 0.7, longest=19).prob_BxL.argmax(axis=1)
  *_, threshold, _ = stopping.rules_of(stops, real)
  assert 0.65 < float(threshold.flag.split('=')[1]) < 0.75 and 'fitted' in threshold.rule
  prob_L = stopping.sampled(stops, 2.0, longest=19).prob_BxL.mean(axis=0)
  real = rng.choice(20, 20_000, p=prob_L / prob_L.sum())
  assert 1.7 < float(stopping.rules_of(stops, real)[-1].flag.split('=')[-1]) < 2.3


@pytest.fixture(scope='module')
def lm():
  """Return a LanguageModel with random weights for star graphs."""
  exp, _, _, state, _ = small.experiment(
    {'task.num_validation': 40, 'sampling.max_length': 30, 'sampling.max_steps': None}
  )
  params = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), state.params)
  return api.LanguageModel(
    exp.cfg, exp.model_cfg, params, batch_size=8, min_buffer=32, stop_temperature=20.0, token={}, gap={}
  )


@pytest.fixture(scope='module')
def prompts(lm):
  source = lm.task.source(lm.cfg.task, 'validation')
  return [prompt_of(source[i % 40]) for i in range(200)]


@pytest.fixture(scope='module')
def stops(lm, prompts):
  return stopping.trajectories(lm, prompts)


def sample(lm, prompts, **settings):
  """Sample rows with a stopping rule; return the rows and their numbers of inserted tokens."""
  cfg = lm.sample_cfg._replace(**settings)
  sampler = continuous_batching.ContinuousSampler(lm.model_cfg, lm.family, cfg, lm.batch_size)
  rows = dict(sampler(lm.params, jax.random.key(0), prompts))
  rows = [rows[i] for i in range(len(prompts))]
  return rows, [int((row['order'] >= 0).sum()) for row in rows]


def test_the_lengths_predicted_for_a_stop_threshold_equal_the_lengths_of_samples(lm, prompts, stops):
  tempered = [stopping.apply_temperature(stop, lm.sample_cfg.stop_temperature) for stop in stops[:40]]
  threshold = float(np.quantile(np.concatenate(tempered), 0.9))
  rule = stopping.at_threshold(tempered, threshold, longest=30)
  rows, lengths = sample(lm, prompts[:40], stop_threshold=threshold)
  assert rule.prob_BxL.argmax(axis=1).tolist() == lengths
  assert (rule.limit == 0).tolist() == [row['stopped'] for row in rows]
  assert len(set(lengths)) > 3


def test_the_predicted_mean_length_for_sampled_stopping_equals_the_mean_length_of_samples(lm, prompts, stops):
  rule = stopping.sampled(stops, 20.0, longest=30)
  _, lengths = sample(lm, prompts, stop_threshold=None)
  assert abs(rule.mean() - np.mean(lengths)) < 4 * np.std(lengths) / len(lengths) ** 0.5


def test_force_first_sets_the_first_stop_probability_to_0_and_several_gaps_are_refused(lm, prompts, stops, monkeypatch):
  rows = [(i, {'stop_prob': stop}) for i, stop in enumerate(stops)]
  monkeypatch.setattr(continuous_batching, 'ContinuousSampler', lambda *_: lambda *_: rows)
  monkeypatch.setattr(lm, 'sample_cfg', lm.sample_cfg._replace(force_first=True))
  for forced, stop in zip(stopping.trajectories(lm, prompts), stops, strict=True):
    assert stop[0] > 0 and forced.tolist() == [0, *stop[1:].tolist()]
  monkeypatch.setattr(lm, 'sample_cfg', lm.sample_cfg._replace(gaps=3))
  with pytest.raises(UserError, match=r'sampling\.gaps=3: stopping rules are compared only for sampling\.gaps=1'):
    stopping.trajectories(lm, prompts)


def test_the_command_prints_all_rules_and_refuses_models_without_a_stop_head(lm, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(api, 'load', lambda *_, **__: lm)
  monkeypatch.setattr(stopping, 'quiet', lambda: None)  # do not change process-wide settings
  assert stopping.main(['stopping', '--workdir=run', '--count=100000000000000']) == 1
  assert '--count=100000000000000: 100000000000000 samples need at least' in capsys.readouterr().err
  code = stopping.main(['stopping', '--workdir=run', '--count=10', f'--plot={tmp_path / "plot.png"}'])
  out = capsys.readouterr().out
  assert code == 0 and (tmp_path / 'plot.png').stat().st_size > 1_000
  assert 'real texts' in out and out.count('(fitted)') == 2 and 'fitted: --config.sampling.stop_threshold=' in out
  monkeypatch.setattr(lm, 'model_cfg', dataclasses.replace(lm.model_cfg, stop_head=False))
  assert stopping.main(['stopping', '--workdir=run']) == 1
  assert 'has no stop head' in capsys.readouterr().err
  assert stopping.main(['stopping', '--workdir=gss://b/run']) == 1
  assert capsys.readouterr().err.startswith('error: --workdir=gss://b/run: unknown scheme gss://')
  assert stopping.main(['stopping']) == 1 and '--workdir is missing' in capsys.readouterr().err
