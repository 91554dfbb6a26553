"""Metrics as (total, weight) pairs, and confidence intervals of proportions."""

import numpy as np
import pytest

from ilm_jax import metrics


def test_metrics_are_added_by_summing_totals_and_weights():
  total = {}
  for part in ({'loss': (3.0, 2.0)}, {'loss': (5.0, 1.0), 'rare': (1.0, 4.0)}, {'none': (0.0, 0.0)}):
    total = metrics.add(total, part)
  assert total == {'loss': (8.0, 3.0), 'rare': (1.0, 4.0), 'none': (0.0, 0.0)}
  assert metrics.means(total) == {'loss': 8.0 / 3.0, 'rare': 0.25}  # a metric of weight 0 has no mean


@pytest.mark.parametrize(
  'successes, trials, low, high',
  [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_equal_the_values_published_by_newcombe_1998(successes, trials, low, high):
  np.testing.assert_allclose(metrics.wilson_interval(successes, trials), (low, high), atol=5e-5)


def test_a_proportion_is_printed_with_its_counts_and_confidence_interval():
  assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
  assert metrics.format_proportion(996, 1000) == '99.60 % (996 of 1000; 95 % interval 98.98 - 99.84)'
