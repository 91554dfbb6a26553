"""Tests of the zebra task: vocabulary, lengths, prompts, text form and scores."""

import numpy as np
import pytest
from zebra_samples import TEXT, assert_one_line, task

from ilm_jax.configs import zebra as zebra_config
from ilm_jax.tasks.zebra import task as zebra
from ilm_jax.tasks.zebra.clues import Clue, to_words
from ilm_jax.tasks.zebra.solver import solve
from ilm_jax.tasks.zebra.source import TOKENIZER, check_config
from ilm_jax.types import UserError

CLS, BOS = 1, 4
CLUE_TEXT = TEXT.split(' ANSWER')[0]


def test_zebra_words_have_the_same_ids_as_in_the_reference_implementation():
  words = zebra.TASK.tokenizer(task()).words
  assert len(words) == zebra.TASK.tokenizer(task()).vocab_size == 25
  assert words[:7] == ('[PAD]', '[CLS]', '[MASK]', '[EOS]', '[BOS]', '[SEP]', '[UNK]')
  assert words[7:13] == ('0', '1', '2', '3', '4', '5')
  assert words[13:20] == ('nbr', 'left-of', 'inbetween', 'immediate-left', 'ends', '!=', '=')
  assert words[20:] == ('c', 'n', 'CLUE_END', 'RHS', 'LHS')


def test_the_row_and_sampling_lengths_of_the_zebra_configs_fit_the_longest_puzzle():
  for name in ('small', 'full'):
    cfg = zebra_config.get_config(name)
    assert cfg.data.row_length >= zebra.TASK.longest(cfg.task) == cfg.sampling.max_length
    assert cfg.sampling.max_steps >= zebra.TASK.longest_answer(cfg.task)
    assert zebra.TASK.longest_answer(cfg.task) == 3 * cfg.task.max_houses * cfg.task.max_attributes
    check_config(cfg.task)
  assert zebra.TASK.longest(zebra_config.get_config('full').task) == 460, (
    'the maximum length should equal the block size in the paper'
  )
  with pytest.raises(ValueError, match='small, full'):
    zebra_config.get_config('medium')


def test_the_chance_accuracy_is_the_mean_probability_that_random_permutations_are_correct():
  assert zebra.TASK.chance(task(max_houses=3, max_attributes=4)) == pytest.approx((6**-3 + 6**-4) / 2)


def test_decoding_a_prompt_and_encoding_the_text_gives_the_same_tokens():
  source = zebra.Source(task(), 'train')
  for index in range(20):
    example = source[index]
    text = zebra.decode(example['tokens'], source.cfg)
    prompt = example['tokens'][example['fixed']].tolist()
    for form in (text, text.split(' ANSWER')[0], '\n ' + text.replace(' ', '  ')):
      assert zebra.encode_prompt(form, source.cfg) == prompt


def test_a_released_puzzle_has_the_expected_token_ids_and_text():
  prompt = zebra.encode_prompt(TEXT, task())
  assert prompt[:9] == [CLS, 17, 24, 20, 7, 8, 23, 22, 14] and prompt[-1] == BOS
  answer = TOKENIZER.ids(TEXT.split('ANSWER ')[1].split())
  assert zebra.decode([*prompt, *answer], task()) == TEXT
  assert zebra.decode(prompt, task()) == CLUE_TEXT + ' ANSWER'


@pytest.mark.parametrize('prompt, parts', [
  ('', ['empty']),
  ('ANSWER 0 0 0', ['empty']),
  (CLUE_TEXT.replace('ends', 'end'), ["unknown token 'end'", '0 ... LHS']),
  (CLUE_TEXT.replace('c 0 1', 'c 0 6'), ["unknown token '6'"]),
  ('[BOS] ' + CLUE_TEXT, ["unknown token '[BOS]'"]),
  (CLUE_TEXT.replace('n 0 0', 'n 1 0'), ['clue 3', 'n 0 HOUSE']),
  (CLUE_TEXT.replace('n 0 0', '0 n 0'), ['clue 3']),
  (CLUE_TEXT.replace('c 2 0 c 1 2', 'c 2 0'), ['clue 4', 'inbetween LHS REF RHS REF REF CLUE_END']),
  (CLUE_TEXT.replace('RHS c 0 0', 'RHS c 0 0 c 0 1'), ['clue 3']),
  (CLUE_TEXT.replace('LHS n', 'RHS n'), ['clue 3']),
  (CLUE_TEXT.removesuffix(' CLUE_END'), ['clue 4']),
  ('CLUE_END ' + CLUE_TEXT, ['clue 1', 'one of = != nbr']),
  (CLUE_TEXT + ' 0 0', ['clue 5']),
  ('= LHS n 0 1 RHS c 0 0 CLUE_END ' + CLUE_TEXT, ['contradict']),
  (CLUE_TEXT + ' != LHS c 0 0 RHS n 0 0 CLUE_END', ['contradict']),
  (CLUE_TEXT + ' = LHS n 0 0 RHS n 0 1 CLUE_END', ['contradict']),
  (' '.join(f'ends LHS c {a} {v} RHS CLUE_END' for a in range(3) for v in range(4)), ['contradict']),
  ('ends LHS c 0 1 RHS CLUE_END ends LHS c 2 1 RHS CLUE_END', ['cannot be solved', '0 of 9 cells']),
  (CLUE_TEXT.removeprefix('ends LHS c 0 1 RHS CLUE_END '), ['cannot be solved', 'of 9 cells']),
  (CLUE_TEXT.replace('c 0 0', 'c 0 4'), ['5 houses', '3 to 4']),
  (CLUE_TEXT.replace('c 2', 'c 5'), ['6 attributes', '3 to 4']),
  (CLUE_TEXT.replace('c 2', 'c 0'), ['2 attributes', '3 to 4']),
])  # fmt: skip
def test_a_malformed_or_unsolvable_prompt_is_refused_with_a_one_line_error(prompt, parts):
  with pytest.raises(UserError) as error:
    zebra.encode_prompt(prompt, task())
  assert_one_line(error, *parts)


def test_clues_need_not_mention_the_largest_value():
  """With four houses, these clues omit the largest value, 3, but determine values 0 to 2 of every attribute."""
  clues = [Clue('=', ((1, value), (2, value))) for value in range(3)]
  clues += [Clue('immediate-left', ((1, value), (3, value))) for value in range(3)]
  clues += [Clue('left-of', ((1, 0), (1, 1))), Clue('left-of', ((1, 1), (1, 2)))]
  text = ' '.join(to_words(clues))
  assert solve(clues, 4, 3).solved
  assert zebra.encode_prompt(text, task())[0] == CLS
  with pytest.raises(UserError) as error:
    zebra.encode_prompt(text, task(max_houses=3))
  assert_one_line(error, 'contradict')


def test_the_score_compares_answers_as_sets_of_cells():
  reference = np.array([7, 7, 8, 7, 8, 9, 8, 7, 7], np.int32)

  def score(*predicted):
    pairs = zebra.score(np.array(predicted, np.int32), reference, task())
    assert pairs['exact_match'][1] == pairs['iou'][1] == 1 and pairs['token_accuracy'][1] == 9
    return tuple(pairs[name][0] for name in ('exact_match', 'iou', 'token_accuracy'))

  assert score(*reference) == (1, 1, 9)
  assert score(8, 7, 7, 7, 7, 8, 7, 8, 9) == (1, 1, 2), 'the order of cells must not affect exact_match and iou'
  assert score(7, 7, 8, 7, 8, 9) == (0, 2 / 3, 6)
  assert score(7, 7, 8, 7, 8, 9, 8, 7, 8) == (0, 2 / 4, 8)
  assert score(*reference, 9, 9, 9) == (0, 3 / 4, 9)
  assert score(*reference, 9) == (0, 3 / 4, 9), 'an incomplete cell counts as a wrong cell'
  assert score(7, *reference[:-1])[:2] == (0, 0), 'an answer shifted by one token should have no correct cell'
  assert score() == (0, 0, 0)
