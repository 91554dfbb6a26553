"""Statistics of generated texts under a scoring model (arXiv 2505.05755), with confidence intervals.

For texts x_i with n_i tokens in the scoring model's vocabulary (the start token not counted):

    nll          mean_i of NLL(x_i) / n_i, in nats per token
    perplexity   exp(sum_i NLL(x_i) / sum_i n_i): generative perplexity
    entropy      mean_i of the entropy of the unigram distribution of x_i's tokens, in nats
    length       mean_i of n_i
    distinct_n   distinct n-grams over all n-grams of all texts together, n = 1 .. 4
    repeated     share of the texts that are equal to an earlier text

Texts without tokens have no NLL and no entropy; they are counted separately. Infilled texts are also compared with a
reference: the true text, or the given parts of the text without fillings:

    change       100 mean_i of (NLL_i - NLL_ref,i) / NLL_ref,i, both per token, in %

Intervals are 95 % percentile bootstrap intervals over the texts; those of proportions are Wilson intervals. For
infilled texts, the sampling unit is the request, because several answers to one request are not independent.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from ilm_jax import metrics
from ilm_jax.evaluation.scoring_models import TextNLL

RESAMPLES = 2_000  # bootstrap resamples of an interval
NGRAMS = (1, 2, 3, 4)
METHOD = f'95 % intervals: percentile bootstrap over texts, {RESAMPLES:,} resamples; Wilson for proportions'


class Estimate(NamedTuple):
  """A number with its 95 % interval; None where the number or the interval is undefined."""

  value: float | None
  low: float | None = None
  high: float | None = None


def bootstrap(totals, weights=None, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
  """Estimate sum(totals) / sum(weights) with a bootstrap interval.

  Args:
    totals: one number per text.
    weights: one number per text; 1 by default, which gives the mean.
    seed: seed of the resampling.
    resamples: number of resamples of the texts, with replacement.

  Returns:
    The estimate. The value is None if the weights sum to 0; the interval is None for fewer than two texts.
  """
  totals = np.asarray(totals, np.float64)
  weights = np.ones_like(totals) if weights is None else np.asarray(weights, np.float64)
  if not len(totals) or not weights.sum():
    return Estimate(None)
  value = float(totals.sum() / weights.sum())
  if len(totals) < 2:
    return Estimate(value)
  rng, ratios = np.random.default_rng(seed), np.zeros(resamples)
  for i in range(resamples):
    index = rng.integers(len(totals), size=len(totals))
    ratios[i] = totals[index].sum() / weights[index].sum()
  return Estimate(value, *map(float, np.percentile(ratios, [2.5, 97.5])))


def proportion(successes, trials, independent: int | None = None) -> Estimate:
  """Estimate a proportion with its Wilson interval; the interval counts `independent` trials (default: all)."""
  if not trials:
    return Estimate(None)
  independent = trials if independent is None else independent
  return Estimate(successes / trials, *metrics.wilson_interval(successes / trials * independent, independent))


def entropy(ids) -> float:
  """Return the entropy of the unigram distribution of a text's tokens, in nats."""
  counts = np.array(list(Counter(ids).values()))
  p = counts / counts.sum()
  return float(-(p * np.log(p)).sum())


def distinct(rows: list[list[int]], n: int) -> float | None:
  """Return the number of distinct n-grams over the number of n-grams; None if there are no n-grams."""
  ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
  return len(set(ngrams)) / len(ngrams) if ngrams else None


def describe(texts: list[str], scored: list[TextNLL], *, seed: int = 0) -> dict:
  """Compute the statistics of a set of texts.

  Args:
    texts: the texts.
    scored: the result of a scoring model's `nll` for these texts.
    seed: seed of the bootstrap.

  Returns:
    {name: Estimate} for the statistics in the module's docstring, and three counts: `texts`, `empty` (without tokens)
    and `cut` (truncated to the scoring model's context).
  """
  nonempty = [text for text in scored if text.num_tokens]
  nll, tokens = np.array([text.nll for text in nonempty]), np.array([text.num_tokens for text in nonempty])
  mean_nll = bootstrap(nll, tokens, seed=seed)
  return {
    'texts': len(texts),
    'empty': len(scored) - len(nonempty),
    'cut': sum(text.truncated for text in scored),
    'nll': bootstrap(nll / tokens, seed=seed),
    'perplexity': Estimate(*(None if x is None else float(np.exp(x)) for x in mean_nll)),
    'entropy': bootstrap([entropy(text.ids) for text in nonempty], seed=seed),
    'length': bootstrap([text.num_tokens for text in scored], seed=seed),
    **{f'distinct_{n}': Estimate(distinct([text.ids for text in nonempty], n)) for n in NGRAMS},
    'repeated': proportion(len(texts) - len(set(texts)), len(texts)),
  }


# --- infilled texts ---------------------------------------------------------------------------------------------------


def join_parts(parts: list[str]) -> str:
  """Join the parts around gaps without fillings; merge the spaces on both sides of a gap, strip those at an end."""
  text = parts[0]
  for part in parts[1:]:
    text += part.lstrip(' ') if not text or text[-1].isspace() else part
  return text if parts[-1] else text.rstrip(' ')


def change(requests: list, scored: list[TextNLL], references: list[TextNLL], *, seed: int = 0) -> dict:
  """Compute the relative change of the NLL per token against references, in %.

  Args:
    requests: the id of the infill request that each text answers. The result is the mean over requests of the mean over
      the answers to a request.
    scored: the NLL of each infilled text.
    references: the NLL of each text's reference.
    seed: seed of the bootstrap.

  Returns:
    {'change': Estimate, 'left_out': the number of texts left out because they or their references are empty or
    truncated}.
  """
  changes, left_out = {}, 0
  for request, text, reference in zip(requests, scored, references, strict=True):
    if not text.num_tokens or not reference.num_tokens or text.truncated or reference.truncated:
      left_out += 1
      continue
    nll, reference_nll = text.nll / text.num_tokens, reference.nll / reference.num_tokens
    changes.setdefault(request, []).append(100 * (nll - reference_nll) / reference_nll)
  return {'change': bootstrap([np.mean(values) for values in changes.values()], seed=seed), 'left_out': left_out}


def matches(requests: list, fillings: list[list[str]], true_fillings: list[list[str]]) -> dict:
  """Compare fillings with the true ones, ignoring white space.

  Args:
    requests: the id of the infill request that each text answers.
    fillings: the generated fillings of each text.
    true_fillings: the true fillings of each text.

  Returns:
    {'exact_match': share of the texts whose fillings are all equal to the true ones, 'filling_match': share of all
    fillings that are}, as Estimates.
  """
  equal = [
    [made.split() == true.split() for made, true in zip(text, true_text, strict=True)]
    for text, true_text in zip(fillings, true_fillings, strict=True)
  ]
  independent = len(set(requests))
  return {
    'exact_match': proportion(sum(map(all, equal)), len(equal), independent),
    'filling_match': proportion(sum(map(sum, equal)), sum(map(len, equal)), independent),
  }


# --- printing and JSON ------------------------------------------------------------------------------------------------

ROW_LABELS = {
  'texts': 'texts',
  'nll': 'NLL per token, nats',
  'perplexity': 'perplexity',
  'entropy': 'entropy, nats',
  'length': 'length, tokens',
  **{f'distinct_{n}': f'distinct {n}-grams' for n in NGRAMS},
  'repeated': 'repeated texts',
  'answers': 'infilled texts',
  'change_truth': 'NLL change against the true text, %',
  'change_input': 'NLL change against the text without fillings, %',
  'exact_match': 'texts with all fillings exact',
  'filling_match': 'exact fillings',
}


def table(columns: dict[str, dict]) -> str:
  """Format the statistics of one or several sets of texts as a plain-text table, one column per set."""
  rows = [['', *columns]]
  for name, label in ROW_LABELS.items():
    if any(name in column for column in columns.values()):
      rows.append([label, *(_cell(column.get(name), name) for column in columns.values())])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(value, name: str) -> str:
  if isinstance(value, int):
    return f'{value:,}'
  if value is None or value.value is None:
    return '–'
  number = '{:+.2f}' if name.startswith('change') else '{:.4f}'
  text = number.format(value.value)
  return text if value.low is None else f'{text} ({number.format(value.low)} – {number.format(value.high)})'


def warnings(statistics: dict, name: str, model) -> list[str]:
  """Return a line each if some texts of the set `name` were truncated or empty."""
  lines = []
  if statistics['cut']:
    lines.append(
      f'{name}: {statistics["cut"]} of {statistics["texts"]} texts are longer than the {model.max_tokens} tokens that '
      'the scoring model can read; only their first tokens were scored'
    )
  if statistics['empty']:
    lines.append(
      f'{name}: {statistics["empty"]} of {statistics["texts"]} texts have no tokens, and so no NLL and no entropy'
    )
  return lines


def values(statistics: dict) -> dict[str, float]:
  """Return the defined estimates without their intervals."""
  return {
    name: item.value for name, item in statistics.items() if isinstance(item, Estimate) and item.value is not None
  }


def plain(statistics):
  """Convert statistics for JSON: each Estimate becomes {'value', 'low', 'high'}."""
  if isinstance(statistics, Estimate):
    return statistics._asdict()
  if isinstance(statistics, dict):
    return {name: plain(value) for name, value in statistics.items()}
  return statistics


# --- MAUVE ------------------------------------------------------------------------------------------------------------


def mauve(texts: list[str], references: list[str]) -> tuple[float | None, str]:
  """Return (MAUVE of texts against references, ''), or (None, why it was not computed).

  Uses the package mauve-text with its default settings.
  """
  try:
    import mauve as library
  except ImportError:
    return None, 'MAUVE was not computed: the package mauve-text is not installed'
  try:
    return float(library.compute_mauve(p_text=references, q_text=texts, verbose=False).mauve), ''
  except Exception as error:  # mauve-text downloads a model, which can fail with many types of exception
    return None, f'MAUVE was not computed: {" ".join(str(error).split())[:200]}'
