"""Prepared data on disk: TFDS builders that write token sequences and documents as ArrayRecord, without TensorFlow."""

import contextlib
import functools
import io
import json
import pathlib
import tempfile

import numpy as np

from ilm_jax.data import storage
from ilm_jax.types import UserError

COUNTS = 'counts.json'  # file with the statistics (numbers of documents, tokens, ...) of a prepared data set


@functools.cache
def _builders() -> dict[str, type]:
  """Return the TFDS builder classes by name; defined in a function, because importing TFDS takes a second."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class LocalInfo(tfds.core.DatasetInfo):
    """A DatasetInfo that does not look for metadata of an unprepared data set in TFDS's public bucket."""

    def initialize_from_bucket(self):
      """Do nothing; the overridden method would search for the data set online and leave an empty temporary folder."""

  class LocalBuilder:
    """Base class of this file's two TFDS builders; `make()` returns a generator of the examples to write."""

    VERSION = tfds.core.Version('1.0.0')  # TFDS makes it part of the data set's path
    code_path = None  # else TFDS looks for metadata files at this path, with a package that it does not install

    def __init__(self, *, make=None, **settings):
      self.make = make
      super().__init__(**settings, file_format='array_record')

    def _split_generators(self, dl_manager):
      del dl_manager
      return {'examples': self._generate_examples()}

    def _generate_examples(self):
      with contextlib.closing(self.make()) as examples:
        for index, example in enumerate(examples):
          yield index, self._record(example)

  # TFDS names a data set's folder after its builder class, so renaming one would hide the data already on disk.
  class TokenSequences(LocalBuilder, tfds.core.GeneratorBasedBuilder):
    """Sequences of token ids below 256, stored in the order in which `make()` yields them."""

    def _info(self):
      features = tfds.features.FeaturesDict({'tokens': tfds.features.Tensor(shape=(None,), dtype=np.uint8)})
      return LocalInfo(builder=self, description='Token sequences.', features=features, disable_shuffling=True)

    def _record(self, tokens):
      return {'tokens': np.asarray(tokens, np.uint8)}

  class Documents(LocalBuilder, tfds.core.GeneratorBasedBuilder):
    """Texts with their token ids, shuffled by TFDS into the same order on every machine."""

    def _info(self):
      features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'tokens': tfds.features.Text()})
      return LocalInfo(builder=self, description='Documents.', features=features)

    def _record(self, document):
      text, tokens = document
      return {'text': text, 'tokens': np.asarray(tokens, '<u4').tobytes()}

  return {'sequences': TokenSequences, 'documents': Documents}


class Prepared:
  """Random access to the records of a prepared data set. Unpickling opens the files again."""

  builder: str  # key of the dict that `_builders()` returns

  def __init__(self, place: pathlib.Path):
    self.place = place
    try:
      self._data = _builders()[self.builder](data_dir=str(place)).as_data_source('examples')
      self._size = len(self._data)
    except Exception as error:  # the libraries raise many types of errors for damaged files
      raise self._damaged(error) from error

  def __len__(self) -> int:
    return self._size

  def __reduce__(self):
    return type(self), (self.place,)

  def _read(self, index: int) -> dict:
    if not 0 <= index < self._size:
      raise IndexError(index)
    try:
      record = self._data[index]
    except Exception as error:  # the libraries raise many types of errors for damaged files
      raise self._damaged(error) from error
    if any(value is None for value in record.values()):
      raise self._damaged(ValueError(f'record {index} is empty'))
    return record

  def _damaged(self, error: Exception) -> UserError:
    return UserError(
      f'the prepared {self.builder} in {self.place} cannot be read ({" ".join(str(error).split())[:120]}): remove that '
      'folder and run the same command again to rebuild it'
    )


class Sequences(Prepared):
  """Random access to token sequences that were prepared on disk."""

  builder = 'sequences'

  def __getitem__(self, index: int) -> np.ndarray:
    return self._read(index)['tokens']


class Documents(Prepared):
  """Random access to documents that were prepared on disk; `counts` holds the statistics written with them."""

  builder = 'documents'

  def __init__(self, place: pathlib.Path):
    super().__init__(place)
    try:
      self.counts = json.loads((place / COUNTS).read_text())
    except (OSError, ValueError) as error:
      raise self._damaged(error) from error

  def tokens(self, index: int) -> np.ndarray:
    """Return the token ids of a document, int32."""
    return np.frombuffer(self._read(index)['tokens'], '<u4').astype(np.int32)

  def text(self, index: int) -> str:
    """Return the text of a document."""
    return self._read(index)['text'].decode()


def open_or_prepare_sequences(folder, name: str, make) -> Sequences:
  """Open the token sequences `name` (ids below 256) in a cache folder; if missing, first write what `make()` yields.

  The name must be unique to the content. Raises UserError if the cache cannot be written.
  """
  return Sequences(storage.once(folder, name, lambda place: _write('sequences', place, make)))


def open_or_prepare_documents(folder, name: str, make) -> Documents:
  """Open the documents `name` in a cache folder; if they are missing, first write those that `make(counts)` yields.

  `make` yields (text, token ids) and may write statistics to the dict `counts`. The name must be unique to the content.
  Raises UserError if the cache cannot be written or the documents cannot be read.
  """

  def fill(place: pathlib.Path):
    counts = {}
    _write('documents', place, lambda: make(counts))
    (place / COUNTS).write_text(json.dumps(counts) + '\n')

  return Documents(storage.once(folder, name, fill))


def _write(builder: str, place: pathlib.Path, make) -> None:
  """Write the examples that `make()` yields as a data set; errors of `make` pass through unchanged.

  Raises OSError, instead of array_record's RuntimeError, if the files cannot be written.
  """
  source_errors = []

  def watched():
    try:
      yield from make()
    except Exception as error:
      source_errors.append(error)
      raise

  try:
    # TFDS prints to standard output, and requires a download folder even if nothing is downloaded.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
      _builders()[builder](make=watched, data_dir=str(place)).download_and_prepare(download_dir=downloads)
  except RuntimeError as error:
    if source_errors:
      raise
    raise OSError(' '.join(str(error).split())) from error
