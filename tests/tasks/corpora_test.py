"""Tests of text corpora: the split of each file and document, where documents end, and errors for invalid files."""

import gzip
import hashlib
import itertools
import json
import pwd
import sys
import types

import pytest
from etils import epath
from text_helpers import DATA, needs_real_text, refused, stories, write

from ilm_jax import paths
from ilm_jax.tasks.text import corpora

HELD_OUT = ('validation', 'test')


# --- files and their splits -------------------------------------------------------------------------------------------


def find(tmp_path, *names):
  """Create a corpus of files with these names; return {split: its file names} and which splits share files."""
  for name in names:
    file = tmp_path / 'folder' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('one\n')
  corpus = corpora.find(str(tmp_path / 'folder'))
  return {split: [file.name for file in files] for split, files in corpus.files.items()}, corpus.shared


LM1B_TRAIN, LM1B_HELD_OUT = (
  [f'{corpora.ARCHIVE}/{folder}.tokenized.shuffled/news.en{suffix}-0000{i}-of-00{count}' for i in (1, 2)]
  for folder, suffix, count in (('training-monolingual', '', 100), ('heldout-monolingual', '.heldout', '050'))
)


@pytest.mark.parametrize(
  ('train', 'held_out'),
  [
    (['TinyStoriesV2-GPT4-train.txt'], ['TinyStoriesV2-GPT4-valid.txt']),
    (LM1B_TRAIN, LM1B_HELD_OUT),
    *((['train.txt'], [name]) for name in ('held_out.txt', 'held-out.txt', 'heldout.txt', 'eval.txt', 'my_val.txt')),
    (['a.TRAIN.tokens', 'b-train.jsonl'], ['VALID.txt']),
  ],
)
def test_file_or_folder_names_mark_training_and_held_out_files(tmp_path, train, held_out):
  files, shared = find(tmp_path, *train, *held_out, 'README', 'notes.md', 'retrieval-notes.txt')
  assert files == {'train': train, 'validation': held_out, 'test': held_out}
  assert shared == dict.fromkeys(HELD_OUT, HELD_OUT)


def test_files_with_test_in_their_names_become_the_test_split(tmp_path):
  files, shared = find(tmp_path, 'a.train.jsonl', 'a.dev.jsonl', 'a.test.jsonl', 'latest-notes.txt')
  assert files == {'train': ['a.train.jsonl'], 'validation': ['a.dev.jsonl'], 'test': ['a.test.jsonl']}
  assert not shared


@pytest.mark.parametrize('names', [['heldout_s10-11.dev.tokens'], ['a.txt', 'b.txt'], ['later.txt', 'train.txt']])
def test_unless_names_mark_training_and_held_out_files_all_splits_share_all_files(tmp_path, caplog, names):
  files, shared = find(tmp_path, *names)
  assert files == dict.fromkeys(corpora.SPLITS, names)
  assert shared == dict.fromkeys(corpora.SPLITS, corpora.SPLITS)
  warned = '(later.txt, train.txt) do not mark both' in caplog.text
  assert warned == ('train.txt' in names), 'a warning is expected if names mark only training files'


def names_of(folder) -> list[str]:
  """Return the names of all files of a corpus."""
  return sorted({file.name for files in corpora.find(str(folder)).files.values() for file in files})


def test_runs_caches_and_hidden_folders_inside_the_corpus_folder_are_skipped(tmp_path, caplog):
  caplog.set_level('INFO', 'absl')
  kept = ['a.txt', 'data/b.txt', 'runs/c.txt', 'text-train/d.txt', 'wiki/h.txt']
  skipped = {  # folder to skip -> file in it that marks it as a run, a cache or similar
    **{'data/1.0.0': 'x.array_record-00000-of-00001', 'words': 'ilm_tokenizer.json', 'runs/text-small': 'run.json'},
    **{'env': 'pyvenv.cfg', 'data/unpacked-0123456789abcdef/lm1b': 'x', 'data/downloads/tinystories': 'x'},
    **{'data/text-train-0123456789abcdef': 'counts.json', '.git': 'HEAD'},
  }
  for name in [*kept, *(f'{folder}/e.txt' for folder in skipped), *(f'{folder}/f/g.jsonl' for folder in skipped)]:
    write(tmp_path / name, ['one'])
  for name in [*map('/'.join, skipped.items()), 'data/1.0.0/dataset_info.json', 'data/1.0.0/features.json']:
    (tmp_path / name).write_text('{}')
  (tmp_path / 'wiki' / 'dataset_info.json').write_text('{}')  # a file of Hugging Face data sets, too
  assert names_of(tmp_path) == kept
  assert names_of(tmp_path) == kept
  (line,) = [line for line in caplog.messages if 'skipped' in line]
  assert 'data/1.0.0/ (holds a TFDS data set), ' in line and 'env/ (holds pyvenv.cfg)' in line and '.git' not in line
  assert line.endswith('(7 in all)')
  for folder in skipped:
    assert names_of(tmp_path / folder) == ['e.txt', 'f/g.jsonl'], 'the corpus folder itself may be of any kind'


@pytest.mark.parametrize(
  ('names', 'own_mark'),
  [
    (['sub/train.txt', 'sub/run.json'], 'sub/checkpoints/1/x'),
    (['text-train-0123456789abcdef/a.txt'], '.text-train-0123456789abcdef.lock'),
    (['downloads/tinystories/train.txt'], 'downloads/tinystories/.train.txt.lock'),
    (['a/train.tfrecord-0-of-1', 'a/dataset_info.json', 'a/features.json'], 'a/pyvenv.cfg'),
  ],
)
def test_training_text_in_a_skipped_folder_is_an_error_unless_the_folder_is_a_run_or_a_cache(tmp_path, names, own_mark):
  for name in ['valid.txt', *names]:
    write(tmp_path / name, ['one'])
  with refused(f'{names[0]} is named like training text, but is in the skipped folder {names[0].rpartition("/")[0]}/'):
    corpora.find(str(tmp_path))
  write(tmp_path / own_mark, ['one'])
  assert names_of(tmp_path) == ['valid.txt']


def test_the_files_of_a_run_whose_workdir_is_the_corpus_folder_cause_no_warning(tmp_path, caplog):
  run_files = ['run.json', 'data.json', 'eval.json', 'events.out.tfevents.1.host', 'checkpoints/1/x', 'tokenizer/x']
  for name in ['train.txt', 'valid.txt', 'tokenizer/ilm_tokenizer.json', 'damaged-checkpoint-2/x', *run_files]:
    write(tmp_path / name, ['one'])
  caplog.set_level('WARNING', 'absl')
  assert names_of(tmp_path) == ['train.txt', 'valid.txt'] and not caplog.messages
  (tmp_path / 'run.json').unlink()
  assert names_of(tmp_path) == ['train.txt', 'valid.txt'] and 'eval.json has an unknown ending' in caplog.text


@pytest.mark.parametrize(
  ('link', 'target'),
  [('again', '.'), ('train/up', '..'), ('valid/more/up', '../..'), ('all', 'train'), ('v', 'valid/more')],
)
def test_a_folder_that_is_reachable_by_several_paths_is_read_once(tmp_path, link, target):
  names = ['train/a.txt', 'valid/b.txt', 'valid/more/c.txt']
  for name in names:
    write(tmp_path / 'corpus' / name, ['one'])
  write(tmp_path / 'elsewhere' / 'd.txt', ['one'])
  (tmp_path / 'corpus' / link).symlink_to(target)
  assert names_of(tmp_path / 'corpus') == names
  (tmp_path / 'corpus' / 'train' / 'z').symlink_to(tmp_path / 'elsewhere')
  assert names_of(tmp_path / 'corpus') == sorted([*names, 'train/z/d.txt'])


@pytest.mark.parametrize('link', ['train', 'x/more/train'])
def test_a_folder_is_read_by_the_path_that_names_a_split_even_if_that_path_is_a_link(tmp_path, link):
  for name in ('folder/x/a.txt', 'folder/x/more/b.txt', 'folder/valid/c.txt'):
    write(tmp_path / name, ['one'])
  (tmp_path / 'folder' / link).symlink_to(tmp_path / 'folder' / ('x' if link == 'train' else 'valid'))
  names = ['train/a.txt', 'train/more/b.txt'] if link == 'train' else ['x/a.txt', 'x/more/b.txt']
  assert names_of(tmp_path / 'folder') == sorted([*names, 'valid/c.txt'])


@pytest.mark.parametrize('name', ['train.txt', 'books', 'b.jsonl.gz', 'train.bin', 'train.csv'])
def test_the_error_for_a_link_without_a_target_names_the_link(tmp_path, name):
  write(tmp_path / 'valid.txt', ['one'])
  (tmp_path / name).symlink_to('/no/such/place')
  with refused(f'data.path={tmp_path}', f'{name} is', 'a link to /no/such/place, which does not exist'):
    corpora.find(str(tmp_path))
  with refused(f'data.path={tmp_path / name} does not exist: it is a link to /no/such/place'):
    corpora.find(str(tmp_path / name))


@pytest.mark.parametrize(
  'name',
  [
    *('train.json', 'train.txt.part', 'train.tar.gz', 'a-Train_2.md', 'myTrain.csv', 'train/part.json', 'train.txt'),
    *('train.txt~', 'train.log', 'train.cfg', 'train.ini', 'train.yaml', 'train/a.log'),
    *('train.json-00000-of-00001', 'train.tfrecord-00000-of-00001', 'train.json-00000-of-00001.gz'),
  ],
)
def test_an_empty_or_unreadable_file_named_like_training_text_is_an_error(tmp_path, name):
  write(tmp_path / 'valid.txt', stories(3))
  write(tmp_path / name, stories(3) if name != 'train.txt' else [])
  with refused(f'data.path={tmp_path}: {name} is named like training text', '*.jsonl', '*.parquet'):
    corpora.find(str(tmp_path))


@pytest.mark.parametrize('name', ['valid.txt', 'all.txt'])
def test_code_and_companions_named_like_training_text_are_only_listed_in_a_warning(tmp_path, caplog, name):
  logs = ['train.log', 'train.yaml'] * (name == 'all.txt')
  for unread in ['train.py', f'{name}.train.md5', *logs]:
    write(tmp_path / unread, ['one'])
  write(tmp_path / name, ['one'])
  assert names_of(tmp_path) == [name]
  assert all(f'{unread} has an unknown ending' in caplog.text for unread in ['train.py', *logs])


def test_a_warning_lists_the_files_in_the_corpus_folder_that_are_not_read(tmp_path, caplog):
  unread = ['README', 'strain.md', 'train.py', 'train.txt.md5', 'training/loss.png', 'valid.json']
  for name in [*unread, 'train.txt', 'valid.txt', 'train.txt.gz']:
    write(tmp_path / name, ['one'])
  assert names_of(tmp_path) == ['train.txt', 'valid.txt']
  listed = (', '.join(f'{name} has an unknown ending' for name in ['README', 'strain.md', 'train.py'])
            + ', train.txt.gz is not needed: train.txt is read instead, train.txt.md5 has an unknown ending, ... ('
            '7 in all)')  # fmt: skip
  assert f'these files are not read: {listed}' in caplog.text


def test_a_compressed_file_is_read_if_the_plain_file_of_its_name_is_empty(tmp_path, caplog):
  for name in ('train.txt', 'valid.txt.gz'):
    write(tmp_path / name, ['one'])
  write(tmp_path / 'valid.txt', [])
  assert names_of(tmp_path) == ['train.txt', 'valid.txt.gz'] and 'not read: valid.txt is empty;' in caplog.text


@pytest.mark.parametrize(
  'name',
  [
    *('a.json', 'a.json.gz', 'a.jsonl.part', 'a.json.part', 'a.jsonl~', 'a.jsonlines', 'a.csv', 'a.html', 'a.arrow'),
    *('a.bin', 'a.tar.bz2', 'a.zip', 'a.zip.gz', 'a.7z', 'a.json-00000-of-00001', 'a.gz-00000-of-00001'),
  ],
)
def test_a_single_file_with_an_unknown_ending_is_an_error(tmp_path, name):
  path = write(tmp_path / name, stories(3))
  with refused(f'data.path={path} has an unknown ending', '*.jsonl', 'rename'):
    corpora.find(str(path))


def test_split_names_in_file_names_are_recognized_only_as_whole_words():
  named = {
    **dict.fromkeys(['train.txt', 'x/TRAIN-1.txt', 'myTrain.txt', 'trainset2.txt', 'training_data.txt'], 'train'),
    **dict.fromkeys(['valid.txt', 'validation/a.txt', 'held_out.txt', 'evaluation.txt', 'devset.txt'], 'validation'),
    **dict.fromkeys(['test.txt', 'testing/a.txt', 'train-test.txt'], 'test'),
    **dict.fromkeys(
      ['a-strain-of-hope.txt', 'invalid.txt', 'trainer.txt', 'évaluer/dévaluation.txt', 'latest.txt'], None
    ),
  }
  assert {name: corpora.split_named(name) for name in named} == named


def test_a_file_whose_owner_has_no_user_name_can_be_read(tmp_path, monkeypatch):
  monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[f'uid not found: {uid}'])  # simulates an owner id without a name
  path = write(tmp_path / 'a.txt', stories(3))
  (file,) = corpora.find(str(path)).files['train']
  assert file.size == path.stat().st_size


def documents_of(corpus, split):
  return [text for _, text in corpora.documents(corpus, split, 'endoftext')]


def test_the_hash_assigns_each_document_to_one_split(tmp_path):
  texts = stories(3_000)
  corpus = corpora.find(str(write(tmp_path / 'all.txt', [*texts, *texts[:100]])))
  splits = {split: documents_of(corpus, split) for split in corpora.SPLITS}
  assert sorted(itertools.chain(*splits.values())) == sorted([*texts, *texts[:100]])
  assert 0.935 < len(splits['train']) / 3_100 < 0.965
  assert 40 < len(splits['validation']) < 115 and 40 < len(splits['test']) < 115
  for split, documents in splits.items():
    for document in documents:
      bucket = int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16) % 40
      assert {0: 'validation', 1: 'test'}.get(bucket, 'train') == split


def test_the_hash_divides_held_out_documents_into_a_validation_and_a_test_half(tmp_path):
  texts = stories(400)
  write(tmp_path / 'train.txt', stories(10, seed=2))
  write(tmp_path / 'valid.txt', texts)
  halves = [documents_of(corpora.find(str(tmp_path)), split) for split in HELD_OUT]
  assert sorted(itertools.chain(*halves)) == sorted(texts)
  assert 150 < len(halves[0]) < 250


# --- documents --------------------------------------------------------------------------------------------------------


def read(tmp_path, content, mode='endoftext', name='all.txt') -> list[str]:
  """Write `content` to a corpus file; return the documents read from it."""
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return [text for _, text in corpora.read(corpora.find(str(tmp_path / name)).files['train'][0], mode)]


@pytest.mark.parametrize(
  ('content', 'mode', 'expected'),
  [
    ('one\ntwo\n<|endoftext|>\nthree', 'endoftext', ['one\ntwo', 'three']),
    ('<|endoftext|>\n\n<|endoftext|>\n \n', 'endoftext', []),
    (
      'a <|endoftext|> b\n<|endoftext|>c\n  <|endoftext|> \nd\n',
      'endoftext',
      ['a <|endoftext|> b\n<|endoftext|>c', 'd'],
    ),
    ('one\n\n\ntwo\n  \nthree\nfour\n', 'endoftext', ['one\n\n\ntwo\n  \nthree\nfour']),
    ('one\n\n\ntwo\n  \nthree\nfour\n', 'paragraph', ['one', 'two', 'three\nfour']),
    ('one\n\n two \nthree', 'line', ['one', 'two', 'three']),
    ('one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n', 'endoftext', ['one\ntwo', 'three']),
    ('\ufeffone\n\ufefftwo', 'line', ['one', '\ufefftwo']),
  ],
)
def test_the_documents_setting_determines_where_documents_end(tmp_path, content, mode, expected):
  assert read(tmp_path, content, mode) == expected


@pytest.mark.parametrize(
  'name',
  [
    *('all.txt', 'ALL.TXT', 'all.tokens', 'all.txt.gz', 'news-00001-of-00100.gz', 'all.txt-1-of-2'),
    *('news.en-00001-of-00100', 'news.en.heldout-00001-of-00050', 'v1.2-all-00001-of-00002'),
    *('all.jsonl', 'all.ndjson', 'all.jsonl.gz', 'all.ndjson-00001-of-00002.gz'),
    *('all.parquet', 'train-00000-of-00001.parquet'),
  ],
)
def test_all_file_formats_give_the_same_documents(tmp_path, name):
  texts = [*stories(30), 'é 日本']
  rows = [{'text': text, 'id': i} for i, text in enumerate(texts)]
  if name.endswith('.parquet'):
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pytest.importorskip('pyarrow').Table.from_pylist(rows), tmp_path / name, row_group_size=7)
    content = (tmp_path / name).read_bytes()
  else:
    lines = map(json.dumps, rows) if 'json' in name else (f'{text}\n<|endoftext|>' for text in texts)
    content = b'\xef\xbb\xbf' + '\n'.join(lines).encode()  # starts with a byte order mark
  content = gzip.compress(content) if name.endswith('.gz') else content
  assert read(tmp_path, content, name=name) == texts
  progress = [done for done, _ in corpora.read(corpora.find(str(tmp_path / name)).files['train'][0], 'endoftext')]
  assert progress == sorted(progress) and progress[-1] <= len(content)
  (tmp_path / 'folder').mkdir()
  (tmp_path / name).rename(tmp_path / 'folder' / name)
  assert names_of(tmp_path / 'folder') == [name]


@pytest.mark.parametrize('name', ['all', 'news.en', 'v1.2', 'all.gz'])
def test_a_single_file_without_an_ending_is_read_as_text(tmp_path, name):
  assert read(tmp_path, gzip.compress(b'one') if name == 'all.gz' else b'one', name=name) == ['one']


@pytest.mark.parametrize(
  ('name', 'content', 'parts'),
  [
    ('all.txt.gz', gzip.compress(b'one\n' * 999, mtime=0)[:-9], ['cannot be read', 'ended before']),
    ('all.txt.gz', b'one', ['cannot be read', 'Not a gzipped file']),
    ('all.jsonl.gz', gzip.compress(b'{"text": "\xff"}', mtime=0), ['not UTF-8: byte 10 is 0xff']),
    ('all.parquet', b'PAR1 and no more', ['not a readable Parquet file']),
    ('all.parquet', {'txt': ['one'], 'id': [1]}, ['expected a column "text", found the columns txt, id']),
    ('all.parquet', {'text': ['one', None]}, ['row 2: expected a string in the column "text", got None']),
  ],
  ids=['cut', 'no gzip', 'no UTF-8', 'no Parquet', 'no text', 'null'],
)
def test_damaged_and_unsuitable_files_are_errors_that_name_the_file(tmp_path, name, content, parts):
  if name == 'all.parquet':
    pyarrow = pytest.importorskip('pyarrow')
    if isinstance(content, dict):
      pytest.importorskip('pyarrow.parquet').write_table(pyarrow.table(content), tmp_path / name)
      content = (tmp_path / name).read_bytes()
  with refused(str(tmp_path / name), *parts):
    read(tmp_path, content, name=name)


def test_the_error_for_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with refused('all.parquet', "pip install 'ilm_jax[parquet]'"):
    read(tmp_path, b'PAR1', name='all.parquet')


def test_a_corpus_in_a_bucket_is_read(tmp_path, monkeypatch):
  for name in ('my-train.txt', 'more/my-valid.txt'):
    write(tmp_path / name, ['one'])
  fake = types.SimpleNamespace(Path=lambda path: epath.Path(str(path).replace('gs://bucket', str(tmp_path))))
  monkeypatch.setattr(paths, 'epath', fake)
  monkeypatch.setattr(paths, '_installed', lambda package: True)
  assert names_of('gs://bucket') == ['more/my-valid.txt', 'my-train.txt']


def test_each_json_line_holds_one_document(tmp_path):
  lines = [{'text': 'one\ntwo', 'id': 3}, {'text': '<|endoftext|>'}, {'text': ' é '}, {'text': ''}]
  content = '\n'.join([json.dumps(lines[0]), '', *map(json.dumps, lines[1:])])
  assert read(tmp_path, content, name='all.jsonl') == ['one\ntwo', '<|endoftext|>', 'é', '']


@pytest.mark.parametrize(
  'line',
  ['{"text": 3}', '{"txt": "a"}', '["text"]', 'text', '{"text": "a"', 'null', '{"text": "\\ud800"}', '[' * 9_999],
)
def test_the_error_for_an_invalid_json_line_names_the_line(tmp_path, line):
  with refused('all.jsonl, line 3', '"text"'):
    read(tmp_path, f'{{"text": "fine"}}\n\n{line}\n', name='all.jsonl')


@pytest.mark.parametrize(('name', 'end'), [('all.txt', '\n'), ('all.txt', '\r\n'), ('all.jsonl', '\r\n')])
def test_the_error_for_invalid_utf8_names_the_byte_and_its_offset(tmp_path, name, end):
  content = end.join(['{"text": "é"}', '{"text": "é"}', '{"text": "']).encode() + b'\xff'
  with refused(name, f'not UTF-8: byte {len(content) - 1} is 0xff'):
    read(tmp_path, content, name=name)


@pytest.mark.parametrize(
  ('tokenized', 'plain'),
  [
    ("But now , she isn 't sure .", "But now, she isn't sure."),
    ('" Go on , " he said .', '"Go on," he said.'),
    ('It cost $ 2,900 , or £ 20 ( 3 % ) .', 'It cost $2,900, or £20 (3%).'),
    ("Who ? The baker 's ; no , they 're not !", "Who? The baker's; no, they're not!"),
    ('See http : / / a.org and / or b', 'See http://a.org and/or b'),
    ('He wrote [ sic ] : no .', 'He wrote [sic]: no.'),
    ("She called it ' the end ' and left ..", "She called it 'the end' and left.."),
    ('A year - on year -- rise', 'A year - on year -- rise'),
    ('" One quote that stays open .', '"One quote that stays open.'),
  ],
)
def test_detokenization_removes_the_extra_spaces_of_lm1b(tokenized, plain):
  assert corpora.detokenize(tokenized) == plain


@needs_real_text
def test_detokenization_of_real_sentences_removes_only_spaces():
  file = next((DATA / 'lm1b').iterdir())
  lines = [line.strip() for line in file.read_text('utf-8').split('\n') if line.strip()]
  shorter = 0
  for line in lines:
    plain = corpora.detokenize(line)
    assert plain.replace(' ', '') == line.replace(' ', '')
    assert not plain.endswith((' .', ' ?', ' !'))
    shorter += len(plain) < len(line)
  assert shorter > 0.99 * len(lines)
