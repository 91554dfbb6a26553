"""The Python API: arguments out of range, memory, paths, 64-bit mode, and prompts with spaces."""

import jax
import numpy as np
import pytest
from random_models import make_lm

import ilm_jax
from ilm_jax.distributed import memory
from ilm_jax.inference import api
from ilm_jax.types import UserError


def again(lm, **settings):
  """Return a LanguageModel with the same weights and other sampling settings."""
  return api.LanguageModel(lm.cfg, lm.model_cfg, lm.params, **settings)


@pytest.mark.parametrize('seed', [-1, 2**32, 2**63, 1.5, '1', True])
def test_a_seed_that_is_not_an_unsigned_32_bit_integer_is_refused(small_lm, seed):
  lm = small_lm('ilm')
  for call in (lm.generate, lm.score):
    with pytest.raises(UserError, match=rf'seed={seed!r}: expected an integer from 0 to 4294967295'):
      call(['the dog'], seed=seed)
  for call in (lm.infill, lm.trace):
    with pytest.raises(UserError, match=rf'seed={seed!r}: expected an integer'):
      call('the ___', seed=seed)


def test_the_largest_seeds_give_different_samples(small_lm):
  texts = [[one.text for one in small_lm('it').infill('the ___', n=4, seed=seed)] for seed in (2**32 - 1, 2**31, 0)]
  assert texts[0] != texts[1] != texts[2] != texts[0]


@pytest.mark.parametrize('value', [0, -1, 1.5, float('nan'), True, '2'])
def test_batch_size_and_n_must_be_whole_numbers_of_at_least_1(small_lm, value):
  with pytest.raises(UserError, match=f'batch_size={value!r}: expected a whole number, at least 1'):
    again(small_lm('ilm'), batch_size=value)
  with pytest.raises(UserError, match=f'n={value!r}: expected a whole number, at least 1'):
    small_lm('ilm').infill('the ___', n=value)


@pytest.mark.parametrize('ids', [[0.5], [True], ['1'], [-1], [2**31], 5, np.array(5), '5', {5}])
def test_request_ids_must_be_whole_numbers_from_0_to_2_to_the_31_minus_1(small_lm, ids):
  with pytest.raises(UserError, match=r'ids: expected a number from 0 to 2\*\*31 - 1 for each of 1 requests'):
    small_lm('ilm').generate(['the dog'], ids=ids)


def test_settings_that_need_more_memory_than_is_available_are_refused_before_decoding(small_lm, monkeypatch):
  lm = small_lm('ilm')  # width 16, at most 8 decoding steps and 96 tokens
  monkeypatch.setattr(memory, 'device_memory', lambda: 10e9)
  monkeypatch.setattr(memory, 'host_memory', lambda: 10e9)
  settings = {'max_steps': 8, 'min_buffer': 96}
  # A row needs 8 bytes per position and per step (8 + 1), and 52 bytes for each of the 96 positions of its buffer.
  message = r'batch_size=4 and sampling.max_length=1000000000 need at least 32\.0 GB of memory .* the 10\.0 GB'
  with pytest.raises(UserError, match=message):
    again(lm, batch_size=4, max_length=10**9, **settings)
  with pytest.raises(UserError, match=r'batch_size=1000000000 and .* need at least 5,832\.0 GB of memory'):
    again(lm, batch_size=10**9, max_length=96, **settings)
  again(lm, batch_size=1_700_000, max_length=96, **settings)  # 9.9 GB
  with pytest.raises(UserError, match=r'n=1000000000000: 1000000000000 samples need at least 1,000,000\.0 GB'):
    lm.infill('the ___', n=10**12)


@pytest.mark.long
def test_64_bit_mode_changes_neither_samples_nor_scores(small_lm):
  for family, limits in (('ilm', {}), ('arm', {}), ('it', {}), ('mdm', {'least': 2, 'most': 2})):
    lm = small_lm(family)
    kinds = [] if family == 'it' else [lambda lm=lm: lm.score(['the dog ran .'])]
    calls = [lambda lm=lm: lm.generate(['the dog'], seed=3), lambda lm=lm, at=limits: lm.infill('the ___ ran', **at)]
    for call in calls + kinds:
      expected = call()
      with jax.enable_x64(True):
        assert call() == expected, family


def test_a_masked_diffusion_model_scores_texts_by_a_bound(small_lm):
  lm = small_lm('mdm')
  (score,) = lm.score(['the dog ran .'])
  assert (score.kind, score.tokens) == ('bound', len(lm.tokenizer.encode('the dog ran .')))
  assert np.isfinite(score.nll) and score.nll > 0 and score.error > 0


def test_generation_preserves_the_spaces_of_a_prompt(small_lm):
  for prompt in ('  the dog', 'the  dog  ', ' ', '\n the'):
    assert small_lm('arm').generate([prompt])[0].text.startswith(prompt)


def test_paths_may_begin_with_a_tilde_and_an_unknown_url_scheme_is_refused(small_lm, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  lm = small_lm('arm')
  page = lm.trace('the dog', path='~/page.html')
  assert (tmp_path / 'page.html').read_text(encoding='utf-8') == page
  with pytest.raises(UserError, match=rf'path={tmp_path}/no/page.html: the page could not be written: No such file'):
    lm.trace('the dog', path='~/no/page.html')
  with pytest.raises(UserError, match=r'path=gss://bucket/page\.html: unknown scheme gss://'):
    lm.trace('the dog', path='gss://bucket/page.html')
  with pytest.raises(UserError, match=rf'{tmp_path}/run: expected the workdir of a run, but there is no run.json'):
    ilm_jax.load('~/run')
  with pytest.raises(UserError, match='workdir=s4://bucket/run: unknown scheme s4://'):
    ilm_jax.load('s4://bucket/run')


def test_a_trace_is_written_to_a_file_and_escapes_closing_script_tags(sentencepiece, small_lm, tmp_path):
  page = small_lm('ilm').trace(['the ___ </script> ran', 'Tom'], path=tmp_path / 'page.html')
  assert (tmp_path / 'page.html').read_text(encoding='utf-8') == page
  assert page.count('</script>') == 2 and '\\u003c/script> ran' in page


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'token': {'temperature': float('nan')}}, r'token.temperature=nan: expected a finite number'),
    ({'token': {'top_p': float('nan')}}, r'token.top_p=nan: expected a finite number'),
    ({'token': {'temperature': float('inf')}}, r'token.temperature=inf: expected a finite number'),
    ({'stop_temperature': float('nan')}, r'sampling.stop_temperature=nan: expected a finite number'),
    ({'stop_threshold': float('nan')}, r'sampling.stop_threshold=nan: expected a finite number'),
    ({'max_length': float('nan')}, r'sampling.max_length=nan: expected a whole number'),
    ({'max_length': 20.5}, r'sampling.max_length=20.5: expected a whole number'),
    ({'gaps': -1}, r'sampling.gaps=-1: expected'),
  ],
)
def test_a_sampling_setting_that_is_not_finite_or_out_of_range_is_refused(small_lm, settings, message):
  with pytest.raises(UserError, match=message):
    again(small_lm('ilm'), **settings)


@pytest.mark.long
def test_sampling_at_a_tiny_temperature_is_greedy(sentencepiece, tmp_path):
  texts = [
    [make_lm(sentencepiece, tmp_path, token={'temperature': t}, gap={'temperature': t}, max_steps=8, batch_size=4,
             stop_threshold=1.0).generate(['the', 'a cat'])]
    for t in (0.0, 1e-38)
  ]  # fmt: skip
  assert texts[0] == texts[1]
