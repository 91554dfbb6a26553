"""Tests of corpus downloads: resuming, the LM1B archive, and errors without a network."""

import http.server
import io
import tarfile
import threading

import pytest
from text_helpers import all_texts, refused, stories, task_config, write_corpus

from ilm_jax.configs import lm1b as lm1b_config
from ilm_jax.data import storage
from ilm_jax.tasks.text import corpora, task


class Server(http.server.BaseHTTPRequestHandler):
  """HTTP server that serves `files` with byte ranges. If `cut` is set, the next response ends after `cut` bytes."""

  files, cut, ranges = {}, None, []

  def do_GET(self):
    content = self.files.get(self.path)
    if content is None:
      return self.send_error(404)
    asked = self.headers.get('Range')
    self.ranges.append(asked)
    start = int(asked.removeprefix('bytes=').removesuffix('-')) if asked else 0
    beyond = start >= len(content)
    self.send_response(416 if beyond else 206 if asked else 200)
    if beyond:
      self.send_header('Content-Range', f'bytes */{len(content)}')
    self.send_header('Content-Length', '0' if beyond else str(len(content) - start))
    self.end_headers()
    end, type(self).cut = self.cut, None
    self.wfile.write(content[start:end])

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  """Start a local HTTP server and redirect the download URLs of all corpora to it."""
  Server.files, Server.cut, Server.ranges = {}, None, []
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  address = f'http://127.0.0.1:{server.server_address[1]}'
  monkeypatch.setattr(
    corpora, 'SOURCES',
    {name: tuple(f'{address}/{url.rpartition("/")[2]}' for url in urls) for name, urls in corpora.SOURCES.items()},
  )  # fmt: skip
  yield Server
  server.shutdown()
  server.server_close()


def test_an_interrupted_download_is_resumed(server, tmp_path):
  corpus = write_corpus(tmp_path / 'corpus')
  files = {'train': (corpus / 'my-train.txt').read_bytes(), 'valid': (corpus / 'my-valid.txt').read_bytes()}
  server.files = {f'/TinyStoriesV2-GPT4-{part}.txt': content for part, content in files.items()}
  server.cut = 1_000
  cfg = task_config('', tmp_path, source='tinystories')
  with refused('the connection ended after 1,000 of', '--config.data.path'):
    task.Source(cfg, 'train')
  folder = tmp_path / 'downloads' / 'tinystories'
  assert [path.name for path in folder.glob('T*')] == ['TinyStoriesV2-GPT4-train.txt.part']
  assert sorted(all_texts(task.Source(cfg, 'train'))) == sorted(stories(60))
  assert server.ranges == [None, 'bytes=1000-', None]
  assert (folder / 'TinyStoriesV2-GPT4-train.txt').read_bytes() == files['train']
  server.files = {}
  assert len(task.Source(cfg, 'validation')) > 0, 'downloaded files must not be downloaded again'


def test_a_temporary_download_file_is_used_if_complete_and_replaced_if_larger_than_the_download(server, tmp_path):
  server.files = {'/a': b'all of it'}
  url = corpora.SOURCES['tinystories'][0].rpartition('/')[0] + '/a'
  (tmp_path / 'a.part').write_bytes(b'all of it')
  (tmp_path / 'b.part').write_bytes(b'something else, and longer')
  for name, ranges in (('a', ['bytes=9-']), ('b', ['bytes=26-', None])):
    server.ranges.clear()
    storage.download(url, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b'all of it' and server.ranges == ranges


def archive(files: dict[str, str]) -> bytes:
  """Return the bytes of a *.tar.gz archive of files (name -> content) in the layout of the LM1B archive."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f'{corpora.ARCHIVE}/{name}')
      info.size = len(content.encode())
      tar.addfile(info, io.BytesIO(content.encode()))
  return out.getvalue()


def test_the_lm1b_archive_is_downloaded_unpacked_and_detokenized(server, tmp_path):
  def shards(pattern, first):
    return {pattern.format(n): ''.join(f"Odd 's goat , number {20 * n + i} , wasn 't sold .\n" for i in range(20))
            for n in range(first, first + 2)}  # fmt: skip

  training = shards('training-monolingual.tokenized.shuffled/news.en-0000{}-of-00100', 1)
  held_out = shards('heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050', 5)
  server.files = {f'/{corpora.ARCHIVE}.tar.gz': archive(training | held_out)}
  cfg = lm1b_config.get_config('small').task
  cfg.cache, cfg.tokenizer.size = str(tmp_path), 300
  train = all_texts(task.Source(cfg, 'train'))
  assert sorted(train) == sorted(f"Odd's goat, number {i}, wasn't sold." for i in range(20, 60))
  rest = all_texts(task.Source(cfg, 'validation')) + all_texts(task.Source(cfg, 'test'))
  assert sorted(rest) == sorted(f"Odd's goat, number {i}, wasn't sold." for i in range(100, 140))
  file = next((tmp_path / 'downloads').rglob('*.tar.gz'))
  cfg.corpus, cfg.source = str(file), ''  # read the archive from a local path
  assert all_texts(task.Source(cfg, 'train')) == train
  cfg.corpus = str(tmp_path / 'cut.tar.gz')
  (tmp_path / 'cut.tar.gz').write_bytes(file.read_bytes()[:200])
  with refused('cut.tar.gz', 'damaged'):
    task.Source(cfg, 'train')


def test_errors_for_failed_downloads_say_which_files_to_put_into_which_folder(server, tmp_path):
  names = 'TinyStoriesV2-GPT4-train.txt and TinyStoriesV2-GPT4-valid.txt'
  folder = str(tmp_path / 'downloads' / 'tinystories')
  for cache, source, parts in (
    (tmp_path, 'tinystories', [names, folder, '--config.data.path=PATH', 'Not Found']),
    ('', 'tinystories', ['data.path and task.cache are empty']),
    (tmp_path, '', ['data.path is empty', '--config.data.path=PATH']),
  ):
    with refused(*parts):
      task.Source(task_config('', cache, source=source), 'train')
