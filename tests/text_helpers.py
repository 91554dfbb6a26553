"""Helpers for tests of the text task: short random stories, corpus files, configs, and checks of error messages."""

import contextlib
import os
import pathlib

import numpy as np
import pytest

from ilm_jax.configs import text as text_config
from ilm_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get('ILM_JAX_DATA') or ROOT.parent / 'shared' / 'data')
needs_real_text = pytest.mark.skipif(not DATA.is_dir(), reason='needs ../shared/data or the folder $ILM_JAX_DATA')


def stories(count: int, seed: int = 0) -> list[str]:
  """Return `count` different short stories."""
  rng = np.random.default_rng(seed)
  names, things = ['Mara', 'Odd', 'Piet', 'Ulla'], ['a boat', 'the goat', 'one red kite', 'an old map', 'two pears']
  verbs = ['found', 'sold', 'carried', 'lost', 'painted']

  def sentence():
    return f'{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}.'

  return [f'Day {seed}-{i}: {sentence()} {sentence()}\n"{sentence()}" So it went{"!" * (i % 3)}' for i in range(count)]


def write(path: pathlib.Path, texts) -> pathlib.Path:
  """Write texts into a corpus file, each followed by the line <|endoftext|>; return the path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{text}\n<|endoftext|>\n' for text in texts), 'utf-8')
  return path


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
  """Write a corpus of 60 training stories and 24 held-out stories; return its folder."""
  write(folder / 'my-train.txt', stories(60))
  write(folder / 'my-valid.txt', stories(24, seed=1))
  return folder


def task_config(path, cache='', **changes):
  """Return the task section of a small text config that trains a tokenizer of 330 tokens."""
  cfg = text_config.get_config('small').task
  cfg.update({'corpus': str(path), 'cache': str(cache), 'length': 160, 'split_long_documents': False, **changes})
  cfg.tokenizer.size = 330
  return cfg


def all_texts(source) -> list[str]:
  """Return the texts of all examples of a data source."""
  return [source.text(i) for i in range(len(source))]


@contextlib.contextmanager
def refused(*parts):
  """Assert that the `with` block raises a UserError with a one-line message that contains all `parts`."""
  with pytest.raises(UserError) as error:
    yield
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value), f'{part!r} is not in {error.value}'
