"""Traces: a self-contained HTML page that animates how a text was generated, with the probability of each insertion."""

import html
import importlib.resources
import json


def record(generation, pieces: list[str]) -> dict:
  """Return the data that the page needs to animate a Generation or Infilling, given the text of each of its tokens."""
  return {
    'name': generation.text[:60],
    'pieces': pieces,
    'order': generation.order,
    'steps': max([*generation.order, -1]) + 1,
    'probabilities': generation.probabilities,
    'stop': generation.stop_probabilities,
    'stopped': generation.stopped,
  }


def page(records: list[dict], title: str = 'Insertion by insertion') -> str:
  """Return an HTML page that animates one or several records, made by `record`; the page needs no network access."""
  data = json.dumps(records, ensure_ascii=False).replace('<', '\\u003c')
  template = importlib.resources.files('ilm_jax.inference').joinpath('trace.html').read_text(encoding='utf-8')
  return template.replace('@TITLE@', html.escape(title)).replace('@DATA@', data)
