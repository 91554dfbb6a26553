"""The report: numbers from what runs wrote, intervals, and the runs it refuses."""

import json
import re

import numpy as np
import pytest

from ilm_jax import metrics
from ilm_jax.evaluation import report
from ilm_jax.runs import logs, run_file
from ilm_jax.types import UserError

COMMIT, OTHER = 'a' * 40, 'b' * 40


def make_run(folder, seed=0, right=90, *, family='ilm', commit=COMMIT, label='star easy', steps=500, **config):
  """A finished run of 100 test examples, as train.py leaves it."""
  folder.mkdir(parents=True)
  start = {'commit': commit, 'devices': '1 x cpu (cpu)', 'cpus': 2}
  settings = {
    'family': family, 'seed': seed, 'steps': steps, 'task': {'label': label, 'order': 'path'}, 'model': {'d_model': 8},
    'sampling': {'max_length': 36, 'gap': {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0}, 'two_stage': True}, **config,
  }  # fmt: skip
  pairs = {'exact_match': [right, 100], 'token_accuracy': [8 * right + 40, 800], 'order_tau': [-50.0, 100.0]}
  run_file.write_json(folder / 'run.json', {'config': settings, 'starts': [start]})
  result = {
    'seed': seed, 'step': steps, 'finished': True, 'config': settings, 'sampler': 'gap greedy', 'pairs': pairs,
    'chance': 1 / 3, 'parameters': 12345, 'order_places': [[0, 9], [9, 0]], 'start': start,
  }  # fmt: skip
  run_file.write_json(folder / 'eval.json', result)
  writer = logs.SummaryWriter(str(folder))
  for step in (100, 200):
    writer.write_scalars(step, {'validation/exact_match': step / 400, 'train/loss': 100 / step})
  writer.close()
  return str(folder)


def cells(text, first):
  """The cells of the first row of a table whose cells begin with `first`."""
  row = next(line for line in text.splitlines() if line.startswith('| ' + ' | '.join(first) + ' |'))
  return [cell.strip() for cell in row.strip('|').split('|')]


def run(capsys, *arguments):
  code = report.main(['report', *arguments])
  out, err = capsys.readouterr()
  return code, out, err


def test_a_row_pools_its_seeds_and_says_how_it_was_made(tmp_path, capsys):
  runs = [make_run(tmp_path / f's{seed}', seed, right) for seed, right in ((2, 80), (0, 90), (1, 100))]
  runs.append(make_run(tmp_path / 'arm', 0, 31, family='arm'))
  code, out, err = run(capsys, *runs)
  assert code == 0 and not err, err
  low, high = metrics.wilson(270, 300)
  half = 4.302653 * 10 / 3**0.5  # Student's 97.5 % quantile with 2 degrees of freedom
  assert cells(out, ['star easy', 'ilm']) == [
    'star easy', 'ilm', f'90.0 ({100 * low:.1f} – {100 * high:.1f})', '90.0, 100.0, 80.0',
    f'90.0 ({90 - half:.1f} – 100.0)', f'{(8 * 270 + 120) / 24:.1f}', '33.3', '100.0',
  ]  # fmt: skip
  assert cells(out, ['star easy', 'arm'])[3:] == ['31.0', '–', f'{(8 * 31 + 40) / 8:.1f}', '33.3', '32.3']
  made = out[out.index('## How') :]
  assert cells(made, ['star easy', 'ilm']) == [
    'star easy', 'ilm', '0, 1, 2', ', '.join(3 * ['500 of 500']), '12,345', '0 min, 0 min, 0 min',
    '1 x cpu (cpu), 2 cores',
    'aaaaaaaaa', 'gap greedy',
  ]  # fmt: skip
  assert cells(out[out.index('## In which') :], ['star easy', 'ilm'])[2:] == ['-0.50', '–', '–']
  for folder in runs:
    for name in ('accuracy.png', 'order.png'):
      assert (tmp_path / folder / name).read_bytes().startswith(b'\x89PNG')
      assert f']({folder}/{name})' in out
    assert f'`{folder}`' in out


def make_text_run(folder, seed=0, nll=(3.0, 5.0, 10.0), error=(0.3, 0.0, 0.4), *, kind='bound', **config):
  """A finished run of a task without right answers, with three test strings."""
  made = make_run(folder, seed, label='stories', **config)
  result = json.loads((folder / 'eval.json').read_text())
  del result['pairs']['exact_match'], result['pairs']['token_accuracy'], result['order_places']
  result |= {'chance': None, 'likelihood': kind}
  result['strings'] = {'nll': list(nll), 'error': list(error), 'tokens': [1, 2, 6]}
  run_file.write_json(folder / 'eval.json', result)
  for path in folder.glob('events.*'):
    path.unlink()
  writer = logs.SummaryWriter(str(folder))
  for step in (100, 200):
    writer.write_scalars(step, {'validation/loss': 90 / step, 'train/loss': 100 / step})
  writer.close()
  return made


def test_likelihoods_have_a_table_of_their_own(tmp_path, capsys):
  runs = [make_text_run(tmp_path / 'a'), make_text_run(tmp_path / 'b', 1, (5.0, 5.0, 14.0))]
  runs.append(make_text_run(tmp_path / 'e', loss={'length_weight': 'elbo'}))
  runs.append(make_text_run(tmp_path / 'c', error=(0, 0, 0), kind='exact', family='arm'))
  code, out, err = run(capsys, *runs)
  assert code == 0 and not err, err
  assert 'Right answers' not in out
  means, sizes = np.array([4.0, 5.0, 12.0]), np.array([2, 3, 7])
  half = 1.96 * means.std(ddof=1) / 3**0.5
  rest = means - 21 / 12 * sizes
  assert cells(out, ['stories', 'ilm']) == [
    'stories', 'ilm', 'bound', f'7.00 ± {half:.2f}', f'1.7500 ± {1.96 * rest.std(ddof=1) / 3**0.5 / 4:.4f}',
    '6.00, 8.00', '3', f'{(2 * 0.25) ** 0.5 / 6:.2f}',
  ]  # fmt: skip
  assert cells(out, ['stories', 'arm'])[2:4] == ['exact', f'6.00 ± {1.96 * np.std([3, 5, 10], ddof=1) / 3**0.5:.2f}']
  assert cells(out, ['stories', 'ilm, length_weight=elbo'])[-1] == '0.17'
  for folder in runs:
    assert f']({folder}/loss.png)' in out and (tmp_path / folder / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert not (tmp_path / folder / 'accuracy.png').exists()


def test_a_row_of_runs_with_and_without_likelihoods_is_refused(tmp_path, capsys):
  runs = [make_run(tmp_path / 'a', 0, label='stories'), make_run(tmp_path / 'b', 1, label='stories')]
  result = json.loads((tmp_path / 'b' / 'eval.json').read_text())
  result |= {'likelihood': 'bound', 'strings': {'nll': [1.0], 'error': [0.0], 'tokens': [1]}}
  run_file.write_json(tmp_path / 'b' / 'eval.json', result)
  code, out, err = run(capsys, '--noplots', *runs)
  assert code == 1 and not out and f'{runs[0]} has no likelihoods, other runs of its row have' in err


def test_other_meshes_and_hosts_are_the_same_row(tmp_path, capsys):
  runs = [
    make_run(tmp_path / 'a', 0, mesh={'data': 8}),
    make_run(tmp_path / 'b', 1, mesh={'data': -1}, distributed={'initialization_timeout': 9}),
  ]
  _, out, _ = run(capsys, '--noplots', *runs)
  assert len(re.findall(r'^\| star easy \| ilm \|', out[: out.index('## How')], re.M)) == 1


def test_a_run_with_nothing_to_count_is_refused(tmp_path, capsys):
  folder = make_text_run(tmp_path / 'a')
  edit(tmp_path / 'a' / 'eval.json', 'strings')
  code, out, err = run(capsys, '--noplots', folder)
  assert code == 1 and not out
  assert 'no right answers to count, and no likelihoods were measured: evaluate it with --mode=eval' in err


def test_a_mean_of_two_seeds_has_no_interval(tmp_path, capsys):
  _, out, _ = run(capsys, '--noplots', *(make_run(tmp_path / str(seed), seed) for seed in (0, 1)))
  assert cells(out, ['star easy', 'ilm'])[4] == '–'
  assert not list(tmp_path.rglob('*.png'))


def test_other_settings_make_another_row(tmp_path, capsys):
  runs = [make_run(tmp_path / 'a', 0), make_run(tmp_path / 'b', 1, model={'d_model': 16})]
  _, out, _ = run(capsys, '--noplots', *runs)
  assert len(re.findall(r'^\| star easy \| ilm \|', out[: out.index('## How')], re.M)) == 2


def test_an_oracle_order_is_its_own_family(tmp_path, capsys):
  folder = make_run(tmp_path / 'a', family='arm', task={'label': 'star easy', 'order': 'oracle'})
  _, out, _ = run(capsys, '--noplots', folder)
  assert cells(out, ['star easy', 'arm, oracle order'])[-1] == '100.0'


@pytest.mark.parametrize(
  'spoil, message',
  [
    (lambda f: (f / 'eval.json').unlink(), 'has no eval.json: finish the run'),
    (lambda f: (f / 'run.json').unlink(), 'there is no run.json'),
    (lambda f: (f / 'run.json').write_text('{}'), 'there is no run.json of one'),
    (lambda f: (f / 'eval.json').write_text('[]'), 'lacks .*which a row needs'),
    (lambda f: (f / 'eval.json').write_text('{"seed": 1'), 'lacks .*which a row needs'),
    (lambda f: edit(f / 'eval.json', 'chance'), "lacks 'chance', which a row needs"),
    (lambda f: edit(f / 'eval.json', 'start'), "lacks 'start', which a row needs"),
  ],
)
def test_a_run_that_lacks_something_is_refused(spoil, message, tmp_path, capsys):
  folder = make_run(tmp_path / 'a')
  spoil(tmp_path / 'a')
  code, out, err = run(capsys, '--noplots', folder)
  assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err


def edit(path, name):
  value = json.loads(path.read_text())
  del value[name]
  path.write_text(json.dumps(value))


def test_mixed_commits_are_named_unless_they_are_asked_for(tmp_path, capsys):
  runs = [make_run(tmp_path / 'a', 0), make_run(tmp_path / 'b', 1, commit=OTHER)]
  code, out, err = run(capsys, '--noplots', *runs)
  assert code == 1 and not out
  assert re.search(rf'aaaaaaaaa \({runs[0]}\), bbbbbbbbb \({runs[1]}\).*--mixed_commits', err)
  code, out, _ = run(capsys, '--noplots', '--mixed_commits', *runs)
  assert code == 0 and 'aaaaaaaaa, bbbbbbbbb' in out
  with pytest.raises(UserError, match='same run twice'):
    report.rows_of([report.read(runs[0])] * 2, mixed_commits=False)


def test_mistakes_on_the_command_line_are_one_line(capsys):
  assert run(capsys)[2].startswith('error: no runs given')
  assert run(capsys, '--plot')[0] == 1
  assert 'ilm-jax report' in run(capsys, '--help')[1]


def test_training_time_is_that_of_each_start(tmp_path):
  for seconds in (30.0, 5.0):
    writer = logs.SummaryWriter(str(tmp_path))
    writer.close()
    path = max(tmp_path.glob('events.*'), key=lambda path: path.stat().st_mtime_ns)
    first = next(logs.read_records(path))[0].wall_time
    from tensorboardX.event_file_writer import RecordWriter
    from tensorboardX.proto.event_pb2 import Event

    record = RecordWriter(str(tmp_path / 'more'))
    record.write(Event(wall_time=first + seconds, step=1).SerializeToString())
    record.close()
    path.write_bytes(path.read_bytes() + (tmp_path / 'more').read_bytes())
    (tmp_path / 'more').unlink()
  assert logs.wall_seconds(tmp_path) == pytest.approx(35.0)


# --- the order of decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'steps, landmark, expected',
  [
    ([0, 1, 2, 3], 1, {'order_tau': (1, 1), 'order_adjacent': (3, 3), 'order_junction': (1 / 3, 1)}),
    ([3, 2, 1, 0], 3, {'order_tau': (-1, 1), 'order_adjacent': (3, 3), 'order_junction': (0, 1)}),
    ([0, 2, 1], None, {'order_tau': (1 / 3, 1), 'order_adjacent': (2, 2)}),
    ([0, 2, 3, 1], None, {'order_tau': (1 / 3, 1), 'order_adjacent': (3, 3)}),  # beside, as nothing was between
    ([0, 3, 1, 2, 4], None, {'order_tau': (0.6, 1), 'order_adjacent': (2, 4)}),
    ([0, 0, 1], 2, {'order_tau': (2 / 3, 1), 'order_adjacent': (1, 1), 'order_junction': (1, 1)}),
    ([0], 0, {}),
    ([], None, {}),
  ],
)
def test_order_statistics(steps, landmark, expected):
  got = metrics.order_statistics(steps, landmark)
  assert got.keys() == expected.keys()
  for name, pair in expected.items():
    np.testing.assert_allclose(got[name], pair, err_msg=name)
