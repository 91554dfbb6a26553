"""How good texts are by what a judge says of them (arXiv 2505.05755), with intervals.

Of texts x_i with n_i tokens of the judge (without its start):

    nll          mean_i of NLL(x_i) / n_i, in nats
    perplexity   exp(sum_i NLL(x_i) / sum_i n_i)
    entropy      mean_i of the entropy of the tokens inside x_i, in nats
    length       mean_i of n_i
    distinct_n   different n-grams of tokens over all n-grams, n = 1 .. 4, of all texts together
    repeated     share of the texts that are equal to an earlier one

Texts without a token have no NLL and no entropy, and are counted. Of texts whose gaps were filled, against each of two
references, the true text and the given parts alone:

    change       100 mean_i of (NLL_i - NLL_ref,i) / NLL_ref,i of the NLL per token

Intervals are 95 % percentile bootstrap intervals over the texts; those of shares are Wilson's. Where a request has
several answers, both count requests: its answers are not independent.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from ilm_jax import metrics
from ilm_jax.evaluation.scoring_models import Judged

RESAMPLES = 2_000
NGRAMS = (1, 2, 3, 4)
METHOD = f'95 %: percentile bootstrap, {RESAMPLES:,} resamples; of shares, Wilson'


class Estimate(NamedTuple):
  """A number and its interval; None where there is none."""

  value: float | None
  low: float | None = None
  high: float | None = None


def bootstrap(totals, weights=None, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
  """sum(totals) / sum(weights), a mean by default, and its interval; no interval for fewer than two.

  Args:
    totals: of each text.
    weights: of each text.
    seed: of the resamples; the first draws the indices of the first resample, and so on.
    resamples: of the texts, with replacement.
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


def share(successes, trials, independent: int | None = None) -> Estimate:
  """A proportion with Wilson's interval, of as many trials as are independent: all of them by default."""
  if not trials:
    return Estimate(None)
  independent = trials if independent is None else independent
  return Estimate(successes / trials, *metrics.wilson(successes / trials * independent, independent))


def entropy(ids) -> float:
  """Of the distribution of the tokens inside a text, in nats."""
  counts = np.array(list(Counter(ids).values()))
  p = counts / counts.sum()
  return float(-(p * np.log(p)).sum())


def distinct(rows: list[list[int]], n: int) -> float | None:
  """Different n-grams over all n-grams; None where there is none."""
  grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
  return len(set(grams)) / len(grams) if grams else None


def describe(texts: list[str], judged: list[Judged], *, seed: int = 0) -> dict:
  """The statistics above, {name: Estimate}, and counts: texts, those without a token, those that were cut."""
  some = [one for one in judged if one.tokens]
  nll, tokens = np.array([one.nll for one in some]), np.array([one.tokens for one in some])
  pooled = bootstrap(nll, tokens, seed=seed)
  return {
    'texts': len(texts),
    'empty': len(judged) - len(some),
    'cut': sum(one.cut for one in judged),
    'nll': bootstrap(nll / tokens, seed=seed),
    'perplexity': Estimate(*(None if x is None else float(np.exp(x)) for x in pooled)),
    'entropy': bootstrap([entropy(one.ids) for one in some], seed=seed),
    'length': bootstrap([one.tokens for one in judged], seed=seed),
    **{f'distinct_{n}': Estimate(distinct([one.ids for one in some], n)) for n in NGRAMS},
    'repeated': share(len(texts) - len(set(texts)), len(texts)),
  }


# --- gaps -------------------------------------------------------------------------------------------------------------


def without_gaps(parts: list[str]) -> str:
  """The parts of a text joined, with one space where there would be two, and none where a gap was at an end."""
  out = parts[0]
  for part in parts[1:]:
    out += part.lstrip(' ') if not out or out[-1].isspace() else part
  return out if parts[-1] else out.rstrip(' ')


def change(requests: list, judged: list[Judged], references: list[Judged], *, seed: int = 0) -> dict:
  """The change of the NLL per token against references, in %.

  Args:
    requests: whose answer each text is; the mean is over requests, of the mean over the answers to each.
    judged: the texts.
    references: of each text.
    seed: of the interval.

  Returns:
    {'change': Estimate, 'left_out': texts that were left out: one of the two has no token, or was cut}.
  """
  found, left_out = {}, 0
  for request, one, other in zip(requests, judged, references, strict=True):
    if not one.tokens or not other.tokens or one.cut or other.cut:
      left_out += 1
      continue
    ours, theirs = one.nll / one.tokens, other.nll / other.tokens
    found.setdefault(request, []).append(100 * (ours - theirs) / theirs)
  return {'change': bootstrap([np.mean(values) for values in found.values()], seed=seed), 'left_out': left_out}


def matches(requests: list, fillings: list[list[str]], truths: list[list[str]]) -> dict:
  """Shares of the texts all of whose fillings are the true ones, and of the fillings that are; spaces do not count."""
  equal = [
    [a.split() == b.split() for a, b in zip(made, true, strict=True)]
    for made, true in zip(fillings, truths, strict=True)
  ]
  independent = len(set(requests))
  return {
    'exact_match': share(sum(map(all, equal)), len(equal), independent),
    'filling_match': share(sum(map(sum, equal)), sum(map(len, equal)), independent),
  }


# --- for people and for JSON ------------------------------------------------------------------------------------------

WORDS = {
  'texts': 'texts',
  'nll': 'NLL a token, nats',
  'perplexity': 'perplexity',
  'entropy': 'entropy, nats',
  'length': 'length, tokens',
  **{f'distinct_{n}': f'distinct {n}-grams' for n in NGRAMS},
  'repeated': 'repeated texts',
  'answers': 'answers',
  'change_truth': 'NLL against the truth, %',
  'change_input': 'NLL against the input, %',
  'exact_match': 'all fillings are the true ones',
  'filling_match': 'fillings that are the true ones',
}


def table(columns: dict[str, dict]) -> str:
  """What was measured of several sets of texts, a column each."""
  rows = [['', *columns]]
  for name, words in WORDS.items():
    if any(name in column for column in columns.values()):
      rows.append([words, *(_cell(column.get(name), name) for column in columns.values())])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(value, name: str) -> str:
  if isinstance(value, int):
    return f'{value:,}'
  if value is None or value.value is None:
    return '–'
  shown = '{:+.2f}' if name.startswith('change') else '{:.4f}'
  text = shown.format(value.value)
  return text if value.low is None else f'{text} ({shown.format(value.low)} – {shown.format(value.high)})'


def warnings(found: dict, name: str, judge) -> list[str]:
  """What to know of texts that were cut or are empty."""
  lines = []
  if found['cut']:
    lines.append(f'{name}: {found["cut"]} of {found["texts"]} are longer than the judge\'s {judge.limit} tokens, which '
                 'it saw of them')  # fmt: skip
  if found['empty']:
    lines.append(f'{name}: {found["empty"]} of {found["texts"]} have no token, and so no NLL and no entropy')
  return lines


def values(found: dict) -> dict[str, float]:
  """The estimates that there are, without their intervals."""
  return {name: one.value for name, one in found.items() if isinstance(one, Estimate) and one.value is not None}


def plain(found):
  """The same for JSON: an Estimate is {'value', 'low', 'high'}."""
  if isinstance(found, Estimate):
    return found._asdict()
  return {name: plain(value) for name, value in found.items()} if isinstance(found, dict) else found


# --- by a library -----------------------------------------------------------------------------------------------------


def mauve(texts: list[str], references: list[str]) -> tuple[float | None, str]:
  """(MAUVE of two sets of texts by the package mauve-text with its defaults, why there is none)."""
  try:
    import mauve as library
  except ImportError:
    return None, 'MAUVE is left out: the package mauve-text is not installed'
  try:
    return float(library.compute_mauve(p_text=references, q_text=texts, verbose=False).mauve), ''
  except Exception as error:  # it needs a model of the hub, and says so in many ways
    return None, f'MAUVE is left out: {" ".join(str(error).split())[:200]}'
