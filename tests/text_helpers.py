"""Test helpers: small stories, corpus files and configs of the text task, captured logs, and error messages."""

import contextlib
import logging as std_logging
import os
import pathlib

import numpy as np
import pytest
from absl import logging

from ilm_jax.configs import text as text_config

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get('ILM_JAX_DATA') or ROOT.parent / 'shared' / 'data')
needs_real_text = pytest.mark.skipif(not DATA.is_dir(), reason='no ../shared/data, no ILM_JAX_DATA')


def stories(count: int, seed: int = 0) -> list[str]:
  """Return small stories, all different."""
  rng = np.random.default_rng(seed)
  names, things = ['Mara', 'Odd', 'Piet', 'Ulla'], ['a boat', 'the goat', 'one red kite', 'an old map', 'two pears']
  verbs = ['found', 'sold', 'carried', 'lost', 'painted']

  def sentence():
    return f'{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}.'

  return [f'Day {seed}-{i}: {sentence()} {sentence()}\n"{sentence()}" So it went{"!" * (i % 3)}' for i in range(count)]


def write(path: pathlib.Path, texts) -> pathlib.Path:
  """Write texts into a corpus file, each followed by a line <|endoftext|>; returns the path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{text}\n<|endoftext|>\n' for text in texts), 'utf-8')
  return path


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
  """Write a corpus of 60 training stories and 24 held-out stories; returns its folder."""
  write(folder / 'my-train.txt', stories(60))
  write(folder / 'my-valid.txt', stories(24, seed=1))
  return folder


def task_config(path, cache='', **changes):
  """Return the task section of a small text config with a trained vocabulary of 330 tokens."""
  cfg = text_config.get_config('small').task
  cfg.update({'corpus': str(path), 'cache': str(cache), 'length': 160, 'split_long_documents': False, **changes})
  cfg.tokenizer.size = 330
  return cfg


def all_texts(source) -> list[str]:
  """Return the texts of all examples of a source."""
  return [source.text(i) for i in range(len(source))]


def assert_one_line(error, *parts):
  """Assert that a caught error's message is a single line that contains all parts."""
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value), f'{part!r} is not in {error.value}'


@contextlib.contextmanager
def captured_logs():
  """Collect the log messages of level INFO and above."""
  lines, handler = [], std_logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  std_logging.getLogger('absl').addHandler(handler)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    yield lines
  finally:
    std_logging.getLogger('absl').removeHandler(handler)
    logging.set_verbosity(verbosity)
