"""Prepared data on disk: TFDS builders that write token sequences and documents as ArrayRecord, without TensorFlow.

A data set is built under a temporary name and renamed when it is complete, so no reader sees a partial data set. A lock
allows one builder process at a time, and a new builder first deletes the unfinished files of killed processes.
"""

import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np

from ilm_jax.data import storage
from ilm_jax.types import UserError

VERSION = '1.0.0'  # version number of our TFDS data sets; it is part of their path
NAME = 'token_sequences'  # folder name that TFDS derives from the class name TokenSequences
COUNTS = 'counts.json'  # file with the statistics (numbers of documents, tokens, ...) of a prepared corpus


# --- TFDS builders ----------------------------------------------------------------------------------------------------


class _Builders(NamedTuple):
  """The TFDS builder classes, for token sequences and for documents."""

  token_sequences: type
  documents: type


@functools.cache
def _builders() -> _Builders:
  """Define the TFDS builder classes; inside a function, because importing TFDS takes a second."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class LocalInfo(tfds.core.DatasetInfo):
    """A DatasetInfo that does not look for metadata of an unprepared data set in TFDS's public bucket."""

    def initialize_from_bucket(self):
      """Do nothing; the TFDS method would search for the data set online and leave an empty temporary folder."""

  class LocalBuilder:
    """Base class of both TFDS builders; `make()` returns a generator of the examples to write."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # with a path, TFDS searches for metadata files there, using a package that it does not install

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

  return _Builders(TokenSequences, Documents)


def _write(builder) -> None:
  """Run a TFDS builder, which writes the data set.

  Raises:
    OSError: the files cannot be written; replaces array_record's RuntimeError. Errors from `builder.make` pass through.
  """
  source_errors, make = [], builder.make

  def watched():
    try:
      yield from make()
    except Exception as error:
      source_errors.append(error)
      raise

  builder.make = watched
  try:
    # TFDS prints to standard output, and requires a download folder even if nothing is downloaded.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
      builder.download_and_prepare(download_dir=downloads)
  except RuntimeError as error:
    if source_errors:
      raise
    raise OSError(' '.join(str(error).split())) from error


# --- token sequences --------------------------------------------------------------------------------------------------


class Prepared:
  """Random access to token sequences that were prepared on disk. Unpickling opens the files again."""

  def __init__(self, folder: str, name: str):
    self.folder, self.name = folder, name
    self._data = _open(folder, name).as_data_source('examples')

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> np.ndarray:
    return self._data[index]['tokens']

  def __reduce__(self):
    return Prepared, (self.folder, self.name)


def _open(folder: str, name: str, make=None):
  return _builders().token_sequences(make=make, data_dir=str(pathlib.Path(folder, name)))


def open_or_prepare_sequences(folder: str, name: str, make) -> Prepared:
  """Open token sequences in a cache folder, writing them first if they are missing.

  Args:
    folder: the cache folder; created if missing.
    name: name of the data set; must be unique to its content, and a valid file name.
    make: function without arguments that returns a generator of the sequences (arrays of token ids below 256).

  Raises:
    UserError: the folder cannot be written.
  """
  folder = str(pathlib.Path(folder).expanduser())
  place = pathlib.Path(folder, name, NAME)
  info_file = place / VERSION / 'dataset_info.json'  # exists only if the data set is complete
  if not info_file.exists():
    try:
      place.mkdir(parents=True, exist_ok=True)
      with storage.locked(place) as alone:
        if not info_file.exists():
          for stale in place.glob('incomplete.*') if alone else ():
            shutil.rmtree(stale)
          _write(_open(folder, name, make))
    except OSError as error:
      if not info_file.exists():  # on a file system without locks, another process may have written the same data first
        raise UserError(
          f'task.cache={folder} could not be written ({error.strerror or error}): free some disk space or choose '
          'another folder'
        ) from error
  return Prepared(folder, name)


# --- documents --------------------------------------------------------------------------------------------------------


class Documents:
  """Random access to documents that were prepared on disk. Unpickling opens the files again.

  Attributes:
    counts: statistics (numbers of documents, tokens, ...) collected when the documents were prepared.
  """

  def __init__(self, place: pathlib.Path):
    self.place = place
    try:
      self.counts = json.loads((place / COUNTS).read_text())
      self._data = _builders().documents(data_dir=str(place)).as_data_source('examples')
      self._size = len(self._data)
    except Exception as error:  # the libraries raise many types of errors for damaged files
      raise self._damaged(error) from error

  def __len__(self) -> int:
    return self._size

  def tokens(self, index: int) -> np.ndarray:
    """Return the token ids of a document, int32."""
    return np.frombuffer(self._read(index)['tokens'], '<u4').astype(np.int32)

  def text(self, index: int) -> str:
    """Return the text of a document."""
    return self._read(index)['text'].decode()

  def _read(self, index: int) -> dict:
    if not 0 <= index < self._size:
      raise IndexError(index)
    try:
      record = self._data[index]
    except Exception as error:  # the libraries raise many types of errors for damaged files
      raise self._damaged(error) from error
    if record['text'] is None or record['tokens'] is None:
      raise self._damaged(ValueError(f'record {index} is empty'))
    return record

  def _damaged(self, error: Exception) -> UserError:
    return UserError(
      f'the prepared documents in {self.place} cannot be read ({" ".join(str(error).split())[:120]}): remove that '
      'folder and run the same command again to rebuild it'
    )

  def __reduce__(self):
    return Documents, (self.place,)


def open_or_prepare_documents(folder, name: str, make) -> Documents:
  """Open documents in a cache folder, writing them first if they are missing.

  Args:
    folder: the cache folder, local or in a bucket (see `storage`); created if missing.
    name: name of the data set; must be unique to its content, and a valid file name.
    make: function that takes a dict and returns a generator of (text, token ids); it may write statistics to the dict.

  Raises:
    UserError: the cache cannot be written, or the prepared documents cannot be read.
  """

  def fill(place: pathlib.Path):
    counts = {}
    _write(_builders().documents(make=lambda: make(counts), data_dir=str(place)))
    (place / COUNTS).write_text(json.dumps(counts) + '\n')

  return Documents(storage.once(folder, name, fill))
