"""Tests of the reader for released zebra puzzles: it accepts only the documented layout and runs no pickled code."""

import os
import pickle

import numpy as np
import pytest
from zebra_samples import CLUES, TABLE, assert_one_line, puzzles, to_record, write_records

from ilm_jax.tasks.zebra import released
from ilm_jax.tasks.zebra.clues import Puzzle
from ilm_jax.types import UserError


def test_puzzles_pickled_with_any_protocol_are_read(tmp_path):
  some = puzzles()[::8]
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert list(released.read(write_records(tmp_path / 'some.pkl', [to_record(p) for p in some], protocol))) == some


def test_pickles_with_arrays_of_numpy_1_are_read(tmp_path):
  content = pickle.dumps([to_record(puzzles()[0])], 2).replace(b'numpy._core.', b'numpy.core.')
  (tmp_path / 'old.pkl').write_bytes(content)
  assert b'numpy.core.multiarray' in content
  assert list(released.read(tmp_path / 'old.pkl')) == puzzles()[:1]


class Attack:
  """An object whose pickle calls a function when it is loaded."""

  def __init__(self, call):
    self.call = call

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_pickle_that_calls_a_function_is_refused_before_the_call(tmp_path, protocol):
  bait = tmp_path / 'bait'
  for call in ((os.mkdir, (str(bait),)), (eval, (f'__import__("os").mkdir({str(bait)!r})',)), (np.load, ('x',)),
               (getattr, ([], 'append'))):  # fmt: skip
    words, table, _ = to_record(puzzles()[0])
    file = write_records(tmp_path / 'bad.pkl', [to_record(puzzles()[0]), [words, table, Attack(call)]], protocol)
    with pytest.raises(UserError) as error:
      list(released.read(file))
    assert_one_line(error, 'refused', call[0].__name__)
  assert not bait.exists()


def test_a_truncated_pickle_is_refused_with_a_one_line_error(tmp_path):
  content = write_records(tmp_path / 'whole.pkl', [to_record(p) for p in puzzles()[:20]]).read_bytes()
  for size in (0, 1, 5, 100, len(content) // 2, len(content) - 1):
    (tmp_path / 'cut.pkl').write_bytes(content[:size])
    with pytest.raises(UserError) as error:
      list(released.read(tmp_path / 'cut.pkl'))
    assert_one_line(error, 'truncated', 'cut.pkl')


def malformed_records(puzzle):
  """Return {what is wrong: record} for records that do not have the expected layout."""
  words, table, order = to_record(puzzle)
  answer_start = words.index('ANSWER') + 1
  return {
    'two members': [words, table],
    'no list': 5,
    'no ANSWER': [[word for word in words if word != 'ANSWER'], table, order],
    'one string': [' '.join(words), table, order],
    'numbers for words': [list(range(9)), table, order],
    'an unknown kind of clue': [['maybe', *words[1:]], table, order],
    'a missing cell': [words[:-3], table, order],
    'a missing digit': [words[:-1], table, order],
    'a wrong cell': [[*words[:-1], str((int(words[-1]) + 1) % 3)], table, order],
    'a repeated cell': [[*words[:-3], *words[answer_start : answer_start + 3]], table, order],
    'a value that is too large': [['=', 'LHS', 'c', '0', '5', 'RHS', 'n', '0', '0', 'CLUE_END', *words], table, order],
    'no house numbers': [words, table[1:], order],
    'reversed house numbers': [words, [table[0][::-1], *table[1:]], order],
    'a row that is no permutation': [words, [*table[:-1], [0] * len(table[0])], order],
    'floats': [words, [[float(value) for value in row] for row in table], order],
    'an array for a table': [words, np.array(table), order],
  }


@pytest.mark.parametrize('what', malformed_records(Puzzle(CLUES, TABLE, [(0, 0, 0)])))
def test_a_malformed_record_is_refused_with_a_one_line_error(tmp_path, what):
  file = write_records(tmp_path / 'odd.pkl', [to_record(puzzles()[1]), malformed_records(puzzles()[0])[what]])
  with pytest.raises(UserError) as error:
    list(released.read(file))
  assert_one_line(error, 'odd.pkl, record 1', 'expected')


@pytest.mark.parametrize(
  'content', [pickle.dumps({'a': 1}), pickle.dumps([]), pickle.dumps('x'), b'PK\x03\x04zip', b'hello\n']
)
def test_files_that_do_not_hold_a_list_of_records_are_refused_with_a_one_line_error(tmp_path, content):
  (tmp_path / 'odd.pkl').write_bytes(content)
  with pytest.raises(UserError) as error:
    list(released.read(tmp_path / 'odd.pkl'))
  assert_one_line(error, 'odd.pkl', 'expected a pickled list of [words, table, order]')
