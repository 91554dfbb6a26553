"""Paths in the flags of commands: output files are replaced atomically; ~ and URL schemes are checked."""

import errno
import os
import stat

import pytest
from text_models import run_command, write_corpus

from ilm_jax.evaluation import convert, generative_perplexity, infill_sets, output, report
from ilm_jax.types import UserError

FULL = os.strerror(errno.ENOSPC)


def test_a_result_file_is_replaced_only_by_a_complete_file(tmp_path):
  path, link = tmp_path / 'out.json', tmp_path / 'link.json'
  path.write_text('old')
  link.symlink_to(path)
  with (
    pytest.raises(UserError, match=f'^--out=x cannot be written: {FULL}$'),
    output.replacing(path, '--out=x') as file,
  ):
    file.write(b'a part')
    raise OSError(errno.ENOSPC, FULL)
  assert path.read_text() == 'old'
  with output.replacing(link, '--out=x') as file:
    file.write(b'new')
    assert path.read_text() == 'old'
  assert path.read_text() == 'new' and link.is_symlink()
  assert {found.name for found in tmp_path.iterdir()} == {'out.json', 'link.json'}


def test_an_existing_pipe_is_written_to_and_not_replaced(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
  with output.replacing(output.check(str(tmp_path / 'pipe')), '--out=pipe') as file:
    file.write(b'result')
  assert os.read(reader, 99) == b'result' and stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)
  os.close(reader)


def test_an_output_file_that_cannot_be_written_or_is_an_input_is_refused(tmp_path):
  (tmp_path / 'samples.jsonl').write_text('{"text": "a"}')
  for out, message in (
    (tmp_path, 'is a folder: expected a file'),
    (tmp_path / 'none' / 'x.json', f'the folder {tmp_path}/none does not exist: create it'),
    (tmp_path / '..' / tmp_path.name / 'samples.jsonl', '--out and --samples are the same file'),
  ):
    with pytest.raises(UserError, match=message):
      output.check(str(out), [('--requests', None), ('--samples', str(tmp_path / 'samples.jsonl'))])
  assert os.fspath(output.check(str(tmp_path / 'new.json'))) == str(tmp_path / 'new.json')


@pytest.mark.parametrize(
  'module, flags, name',
  [
    (generative_perplexity, '--model=m --samples={}', '--samples'),
    (generative_perplexity, '--model=m --samples=SAMPLES --requests={}', '--requests'),
    (generative_perplexity, '--model={} --samples=SAMPLES', '--model'),
    (generative_perplexity, '--model=m --samples=SAMPLES --out={}', '--out'),
    (infill_sets, '--path=CORPUS --tokenizer={}', '--tokenizer'),
    (infill_sets, '--path=CORPUS --out={}', '--out'),
    (report, '{}', ''),
    (convert, '--check={}', '--check'),
    (convert, '--workdir={} --out=x.npz', '--workdir'),
    (convert, '--workdir=r --out={}', '--out'),
  ],
)
def test_every_path_flag_refuses_unknown_home_folders_and_unknown_url_schemes(module, flags, name, tmp_path, capsys):
  (tmp_path / 'samples.jsonl').write_text('{"text": "a", "infill": ["a"], "id": 0, "spans": [], "fillings": []}')
  words = flags.replace('SAMPLES', str(tmp_path / 'samples.jsonl')).replace('CORPUS', str(write_corpus(tmp_path)))
  for value, message in (
    ('gss://bucket/x.npz', f'{name and f"{name}="}gss://bucket/x.npz: unknown scheme gss://'),
    ('~no such user/x.npz', f'{name and f"{name}="}~no such user/x.npz: the home folder of ~no such user is unknown'),
  ):
    code, out, err = run_command(capsys, module, *(word.format(value) for word in words.split()))
    assert (code, out, err.count('\n')) == (1, '', 1) and message in err, err


def test_infill_sets_reports_a_full_disk_and_does_not_overwrite_its_corpus(tmp_path, capsys):
  flags = [f'--path={write_corpus(tmp_path)}', '--documents=paragraph', '--count=9']
  code, out, err = run_command(capsys, infill_sets, *flags, '--out=/dev/full')
  assert (code, out, err) == (1, '', f'error: --out=/dev/full cannot be written: {FULL}\n')
  corpus = tmp_path / 'valid.txt'
  before = corpus.read_bytes()
  code, _, err = run_command(capsys, infill_sets, *flags, f'--path={corpus}', f'--out={corpus}')
  assert code == 1 and '--out and --path are the same file' in err and corpus.read_bytes() == before
