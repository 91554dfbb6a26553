"""Statistics of generated texts under a scoring model (as in arXiv 2505.05755), with confidence intervals.

For texts x_i with n_i tokens in the scoring model's vocabulary (not counting the start token):

    nll          mean_i of NLL(x_i) / n_i, in nats per token
    perplexity   exp(sum_i NLL(x_i) / sum_i n_i): generative perplexity
    entropy      mean_i of the entropy of the unigram distribution of x_i's tokens, in nats
    length       mean_i of n_i
    distinct_n   number of distinct n-grams / number of n-grams, over all texts together, for n = 1 .. 4
    repeated     share of the texts that are equal to an earlier text

Texts without tokens have no NLL and no entropy; they are counted separately. Infilled texts are also compared with a
reference text, which is the true text, or the given parts of the text without fillings:

    change       100 mean_i of (NLL_i - NLL_ref,i) / NLL_ref,i in %, with both NLLs per token

Intervals are 95 % percentile bootstrap intervals over the texts; those of proportions are Wilson intervals. For
infilled texts, the sampling unit is the request, because several answers to one request are not independent.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from ilm_jax import metrics
from ilm_jax.evaluation.scoring_models import TextNLL

RESAMPLES = 2_000  # number of bootstrap resamples for each confidence interval
NGRAMS = (1, 2, 3, 4)
METHOD = f'95 % intervals: percentile bootstrap over texts, {RESAMPLES:,} resamples; Wilson for proportions'


class Estimate(NamedTuple):
  """An estimate with its 95 % confidence interval (low, high); fields that are undefined are None."""

  value: float | None
  low: float | None = None
  high: float | None = None


def bootstrap(totals, weights=None, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
  """Return sum(totals) / sum(weights) and its 95 % bootstrap interval; each text has one total and one weight (or 1).

  The value is None if the weights sum to 0; the interval is None for fewer than two texts.
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
  """Estimate successes / trials with its Wilson interval, as if there were `independent` trials (default: all)."""
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
  """Return (number of distinct n-grams) / (number of n-grams) of all rows; None if there are no n-grams."""
  ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
  return len(set(ngrams)) / len(ngrams) if ngrams else None


def describe(texts: list[str], scored: list[TextNLL], *, seed: int = 0) -> dict:
  """Compute {name: Estimate} for the statistics that the module docstring lists, from texts and their scores.

  The result also has three counts: `texts`, `empty` (texts without tokens) and `cut` (texts truncated to the scoring
  model's context).
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


def join_parts(parts: list[str]) -> str:
  """Join the text parts around gaps, without fillings; merge the two spaces around a gap; strip spaces at the ends."""
  text = parts[0]
  for part in parts[1:]:
    text += part.lstrip(' ') if not text or text[-1].isspace() else part
  return text if parts[-1] else text.rstrip(' ')


def change(requests: list, scored: list[TextNLL], references: list[TextNLL], *, seed: int = 0) -> dict:
  """Compute how far, in %, the NLL per token of infilled texts is above the NLL per token of their reference texts.

  `requests` has the id of the infill request that each text answers: the change is averaged over the answers to a
  request, then over requests. Returns {'change': Estimate, 'left_out': the number of texts that are excluded because
  the text or its reference is empty or truncated}.
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
  """Compare generated with true fillings, ignoring white space; `requests` has the id of each text's infill request.

  Returns two Estimates: 'exact_match', the share of the texts whose fillings are all equal to the true fillings, and
  'filling_match', the share of the fillings that are equal to the true filling.
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


ROW_LABELS = {
  'texts': 'texts', 'nll': 'NLL per token, nats', 'perplexity': 'perplexity', 'entropy': 'entropy, nats',
  'length': 'length, tokens', **{f'distinct_{n}': f'distinct {n}-grams' for n in NGRAMS},
  'repeated': 'repeated texts', 'answers': 'infilled texts', 'change_truth': 'NLL change against the true text, %',
  'change_input': 'NLL change against the text without fillings, %', 'exact_match': 'texts with all fillings exact',
  'filling_match': 'exact fillings',
}  # fmt: skip


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
  """Return warnings, one per line, if texts of the set `name` were truncated to the model's context or are empty."""
  too_long = f'are longer than the {model.max_tokens} tokens that the scoring model can read; only their first tokens'
  reasons = {'cut': f'{too_long} were scored', 'empty': 'have no tokens, and so no NLL and no entropy'}
  counts = {reason: statistics[key] for key, reason in reasons.items() if statistics[key]}
  return [f'{name}: {count} of {statistics["texts"]} texts {reason}' for reason, count in counts.items()]


def values(statistics: dict) -> dict[str, float]:
  """Return {name: value} for all statistics whose estimate is defined, without confidence intervals."""
  return {name: item.value for name, item in statistics.items() if getattr(item, 'value', None) is not None}


def plain(statistics):
  """Convert statistics to plain dicts for JSON: each Estimate becomes a dict with 'value', 'low' and 'high'."""
  if isinstance(statistics, dict):
    return {name: plain(value) for name, value in statistics.items()}
  return statistics._asdict() if isinstance(statistics, Estimate) else statistics


def mauve(texts: list[str], references: list[str]) -> tuple[float | None, str]:
  """Return (MAUVE score of texts against references, ''), or (None, reason why mauve-text did not compute it)."""
  try:
    import mauve as library
  except ImportError:
    return None, 'MAUVE was not computed: the package mauve-text is not installed'
  try:
    return float(library.compute_mauve(p_text=references, q_text=texts, verbose=False).mauve), ''
  except Exception as error:  # mauve-text downloads a model, which can fail with many types of exception
    return None, f'MAUVE was not computed: {" ".join(str(error).split())[:200]}'
