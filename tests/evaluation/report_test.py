"""`ilm-jax report`: tables, confidence intervals and plots of finished runs; runs and flags that are refused."""

import json
import re

import numpy as np
import pytest
from text_models import run_command

from ilm_jax import metrics
from ilm_jax.evaluation import report, report_rows
from ilm_jax.runs import logs, run_file
from ilm_jax.types import UserError

COMMIT, OTHER_COMMIT = 'a' * 40, 'b' * 40


def write_run(
  folder,
  seed=0,
  correct=90,
  *,
  family='ilm',
  commit=COMMIT,
  label='star easy',
  metric='validation/exact_match',
  **config,
):
  """Write the files of a finished run with 100 test examples; return its folder as a string."""
  folder.mkdir(parents=True)
  start = {'commit': commit, 'devices': '1 x cpu (cpu)', 'cpus': 2}
  settings = {
    'family': family, 'seed': seed, 'steps': 500, 'task': {'label': label, 'order': 'path'}, 'model': {'d_model': 8},
    'sampling': {'max_length': 36, 'gap': {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0}, 'two_stage': True}, **config,
  }  # fmt: skip
  pairs = {'exact_match': [correct, 100], 'token_accuracy': [8 * correct + 40, 800], 'order_tau': [-50.0, 100.0]}
  run_file.write_json(folder / 'run.json', {'config': settings, 'starts': [start]})
  result = {
    'seed': seed, 'step': 500, 'finished': True, 'config': settings, 'sampler': 'gap greedy', 'pairs': pairs,
    'chance': 1 / 3, 'parameters': 12345, 'order_places': [[0, 9], [9, 0]], 'start': start,
  }  # fmt: skip
  run_file.write_json(folder / 'eval.json', result)
  writer = logs.SummaryWriter(str(folder))
  for step in (100, 200):
    writer.write_scalars(step, {metric: step / 400, 'train/loss': 100 / step})
  writer.close()
  return str(folder)


def write_text_run(folder, seed=0, nll=(3.0, 5.0, 10.0), error=(0.3, 0.0, 0.4), *, kind='bound', **config):
  """Write the files of a finished text run, which has likelihoods of three test strings but no accuracy."""
  write_run(folder, seed, label='stories', metric='validation/loss', **config)
  strings = {'nll': list(nll), 'error': list(error), 'tokens': [1, 2, 6]}
  new = {'chance': None, 'likelihood': kind, 'strings': strings, 'pairs': {}, 'order_places': []}
  new['judge'] = {'name': 'runs/arm'}  # the key of `scoring_model` in the files of older versions
  edit_result(folder, lambda result: result.update(new))
  return str(folder)


def edit_result(folder, edit):
  """Edit the eval.json of a run with the function `edit`."""
  result = json.loads((folder / 'eval.json').read_text())
  edit(result)
  run_file.write_json(folder / 'eval.json', result)


def cells(text, *first):
  """Return the cells of the first table row whose leading cells are `first`."""
  row = next(line for line in text.splitlines() if line.startswith('| ' + ' | '.join(first) + ' |'))
  return [cell.strip() for cell in row.strip('|').split('|')]


def section(text, heading):
  return text[text.index(f'## {heading}') :]


def accuracy_rows(text):
  """Return the number of rows that start with `star easy | ilm` in the accuracy table."""
  return len(re.findall(r'^\| star easy \| ilm \|', text[: text.index('## Training')], re.M))


@pytest.fixture
def run_report(capsys):
  """Return a function that runs `ilm-jax report`: arguments -> (exit code, stdout, stderr)."""
  return lambda *arguments: run_command(capsys, report, *arguments)


# --- tables and plots -------------------------------------------------------------------------------------------------


def test_a_table_row_pools_runs_with_different_seeds_and_the_report_lists_its_runs_and_command(tmp_path, run_report):
  runs = [write_run(tmp_path / f's{seed}', seed, correct) for seed, correct in ((2, 80), (0, 90), (1, 100))]
  runs += [write_run(tmp_path / f'arm{seed}', seed, 31, family='arm') for seed in (0, 1)]
  runs.append(write_run(tmp_path / 'oracle', family='arm', task={'label': 'star easy', 'order': 'oracle'}))
  code, out, err = run_report('--noplots', *runs)
  assert code == 0 and not err, err
  low, high = metrics.wilson_interval(270, 300)
  half = 4.302653 * 10 / 3**0.5  # 97.5 % quantile of t (2 degrees of freedom) x standard error of three results
  assert cells(out, 'star easy', 'ilm')[2:] == [
    f'90.0 ({100 * low:.1f} – {100 * high:.1f})', '90.0, 100.0, 80.0', f'90.0 ({90 - half:.1f} – 100.0)',
    f'{(8 * 270 + 120) / 24:.1f}', '33.3', '100.0',
  ]  # fmt: skip
  assert cells(out, 'star easy', 'arm, oracle order')[-1] == '100.0'
  assert cells(out, 'star easy', 'arm')[3:] == ['31.0, 31.0', '–', f'{(8 * 31 + 40) / 8:.1f}', '33.3', '32.3']
  assert cells(section(out, 'Training and sampling'), 'star easy', 'ilm')[2:] == [
    '0, 1, 2', ', '.join(3 * ['500 of 500']), '12,345', '0 min, 0 min, 0 min', '1 x cpu (cpu), 2 cores', 'aaaaaaaaa',
    'gap greedy',
  ]  # fmt: skip
  assert cells(section(out, 'Decoding order'), 'star easy', 'ilm')[2:] == ['-0.50', '–', '–']
  assert all(f'- `{folder}`\n' in out for folder in runs)
  assert f'Made by `ilm-jax report --noplots {" ".join(runs)}` on ' in out
  assert not list(tmp_path.rglob('*.png'))


def test_plots_are_written_into_the_run_folders_and_linked(tmp_path, run_report):
  runs = {write_run(tmp_path / 'a'): ['accuracy.png', 'order.png'], write_text_run(tmp_path / 'b'): ['loss.png']}
  code, out, err = run_report(*runs)
  assert code == 0 and not err, err
  for folder, names in runs.items():
    assert sorted(path.name for path in (tmp_path / folder).glob('*.png')) == names
    for name in names:
      assert (tmp_path / folder / name).read_bytes().startswith(b'\x89PNG') and f']({folder}/{name})' in out


def test_a_run_in_a_folder_with_brackets_and_spaces_is_read_and_linked(tmp_path, run_report, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write_run(tmp_path / 'z1')
  folder = tmp_path / 'my z[1] (b)'
  write_run(folder, 1, 50)
  code, out, err = run_report('~/my z[1] (b)')
  assert code == 0 and not err, err
  assert cells(out, 'star easy', 'ilm')[3] == '50.0'
  assert f'- `{folder}`: ' in out and f']({tmp_path}/my%20z%5B1%5D%20%28b%29/order.png)' in out
  assert (folder / 'order.png').exists() and not list((tmp_path / 'z1').glob('*.png'))


def test_a_plot_that_cannot_be_written_gives_a_one_line_error(tmp_path, run_report):
  folder = write_run(tmp_path / 'a')
  (tmp_path / 'a' / 'order.png').mkdir()
  code, out, err = run_report(folder)
  assert (code, out, err) == (1, '', f'error: {folder}/order.png cannot be written: Is a directory\n')


def test_likelihoods_are_reported_in_a_separate_table(tmp_path, run_report):
  runs = [write_text_run(tmp_path / 'a'), write_text_run(tmp_path / 'b', 1, (5.0, 5.0, 14.0))]
  runs.append(write_text_run(tmp_path / 'e', loss={'length_weight': 'elbo'}))
  runs.append(write_text_run(tmp_path / 'c', error=(0, 0, 0), kind='exact', family='arm'))
  code, out, err = run_report('--noplots', *runs)
  assert code == 0 and not err, err
  assert '## Accuracy' not in out
  means, sizes = np.array([4.0, 5.0, 12.0]), np.array([2, 3, 7])
  half = 1.96 * means.std(ddof=1) / 3**0.5
  residuals = means - 21 / 12 * sizes
  assert cells(out, 'stories', 'ilm')[2:] == [
    'bound', f'7.00 ± {half:.2f}', f'1.7500 ± {1.96 * residuals.std(ddof=1) / 3**0.5 / 4:.4f}', '6.00, 8.00', '3',
    f'{(2 * 0.25) ** 0.5 / 6:.2f}',
  ]  # fmt: skip
  assert cells(out, 'stories', 'arm')[2:4] == ['exact', f'6.00 ± {1.96 * np.std([3, 5, 10], ddof=1) / 3**0.5:.2f}']
  assert cells(out, 'stories', 'ilm, length_weight=elbo')[-1] == '0.17'


# --- which runs share a table row -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'one, other, rows',
  [
    ({}, {'model': {'d_model': 16}}, 2),
    ({'mesh': {'data': 8}}, {'mesh': {'data': -1}, 'distributed': {'initialization_timeout': 9}}, 1),
    ({'eval': {'show': 3}, 'data': {'workers': 4}}, {'eval': {'print_samples': 9}, 'data': {'num_workers': 0}}, 1),
  ],
  ids=['different model', 'different mesh', 'old and new names of settings'],
)
def test_runs_share_a_table_row_if_their_results_are_comparable(one, other, rows, tmp_path, run_report):
  runs = [write_run(tmp_path / 'a', 0, **one), write_run(tmp_path / 'b', 1, **other)]
  assert accuracy_rows(run_report('--noplots', *runs)[1]) == rows


def test_runs_of_different_commits_share_a_row_only_with_the_flag_mixed_commits(tmp_path, run_report):
  runs = [write_run(tmp_path / 'a', 0), write_run(tmp_path / 'b', 1, commit=OTHER_COMMIT)]
  code, out, err = run_report('--noplots', *runs)
  assert code == 1 and not out
  assert re.search(rf'aaaaaaaaa \({runs[0]}\), bbbbbbbbb \({runs[1]}\).*--mixed_commits', err)
  code, out, _ = run_report('--noplots', '--mixed_commits', *runs)
  assert code == 0 and 'aaaaaaaaa, bbbbbbbbb' in out
  with pytest.raises(UserError, match='have equal settings and the same seed 0: leave one out'):
    report_rows.group([report_rows.read(runs[0])] * 2, mixed_commits=False)
  unknown = write_run(tmp_path / 'c', commit='unknown')
  assert 'was started outside a git checkout' in run_report('--noplots', unknown)[2]


def test_a_table_row_of_runs_with_and_without_likelihoods_is_refused(tmp_path, run_report):
  runs = [write_run(tmp_path / 'a', 0, label='stories'), write_run(tmp_path / 'b', 1, label='stories')]
  strings = {'nll': [1.0], 'error': [0.0], 'tokens': [1]}
  edit_result(tmp_path / 'b', lambda result: result.update(likelihood='bound', strings=strings))
  code, out, err = run_report('--noplots', *runs)
  assert code == 1 and not out and f'{runs[0]} has no likelihoods, but other runs of its table row have' in err


# --- runs and flags that are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda f: (f / 'eval.json').unlink(), 'has no eval.json: finish the run'),
    (lambda f: (f / 'run.json').unlink(), 'it has no valid run.json'),
    (lambda f: (f / 'run.json').write_text('{}'), 'it has no valid run.json'),
    (lambda f: (f / 'eval.json').write_text('[]'), 'eval.json lacks .*, which the tables need'),
    (lambda f: (f / 'eval.json').write_text('{"seed": 1'), 'eval.json lacks .*, which the tables need'),
    (lambda f: edit_result(f, lambda result: result.pop('chance')), "eval.json lacks 'chance', which the tables need"),
    (
      lambda f: edit_result(f, lambda result: result['pairs'].pop('exact_match')),
      'has no right answers, and no likelihoods were measured: evaluate the run with --mode=eval',
    ),
  ],
)
def test_report_refuses_incomplete_runs(damage, message, tmp_path, run_report):
  folder = write_run(tmp_path / 'a')
  damage(tmp_path / 'a')
  code, out, err = run_report('--noplots', folder)
  assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err


def test_wrong_report_flags_give_a_one_line_error(run_report):
  assert run_report()[2].startswith('error: no runs given')
  assert run_report('--plot')[0] == 1
  assert run_report('gss://b/run')[2].startswith('error: gss://b/run: unknown scheme gss://')
  assert 'ilm-jax report' in run_report('--help')[1]


# --- training time ----------------------------------------------------------------------------------------------------


def test_training_time_is_summed_over_all_starts_of_a_run(tmp_path):
  from tensorboardX.event_file_writer import RecordWriter
  from tensorboardX.proto.event_pb2 import Event

  for seconds in (30.0, 5.0):
    logs.SummaryWriter(str(tmp_path)).close()
    path = max(tmp_path.glob('events.*'), key=lambda path: path.stat().st_mtime_ns)
    first = next(logs.read_records(path))[0].wall_time
    record = RecordWriter(str(tmp_path / 'record'))
    record.write(Event(wall_time=first + seconds, step=1).SerializeToString())
    record.close()
    path.write_bytes(path.read_bytes() + (tmp_path / 'record').read_bytes())
    (tmp_path / 'record').unlink()
  assert logs.wall_seconds(tmp_path) == pytest.approx(35.0)


# --- decoding order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'steps, landmark, expected',
  [
    ([0, 1, 2, 3], 1, {'order_tau': (1, 1), 'order_adjacent': (3, 3), 'order_junction': (1 / 3, 1)}),
    ([3, 2, 1, 0], 3, {'order_tau': (-1, 1), 'order_adjacent': (3, 3), 'order_junction': (0, 1)}),
    ([0, 2, 1], None, {'order_tau': (1 / 3, 1), 'order_adjacent': (2, 2)}),
    ([0, 2, 3, 1], None, {'order_tau': (1 / 3, 1), 'order_adjacent': (3, 3)}),  # adjacent when inserted
    ([0, 3, 1, 2, 4], None, {'order_tau': (0.6, 1), 'order_adjacent': (2, 4)}),
    ([0, 0, 1], 2, {'order_tau': (2 / 3, 1), 'order_adjacent': (1, 1), 'order_junction': (1, 1)}),
    ([0], 0, {}),
    ([], None, {}),
  ],
)
def test_order_statistics_of_short_answers_equal_hand_computed_values(steps, landmark, expected):
  result = metrics.order_statistics(steps, landmark)
  assert result.keys() == expected.keys()
  for name, pair in expected.items():
    np.testing.assert_allclose(result[name], pair, rtol=1e-6, atol=1e-12, err_msg=name)
