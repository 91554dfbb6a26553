"""Token sequences and documents prepared on disk: TFDS builders that write ArrayRecord and need no TensorFlow.

A preparation is whole or absent: it is written beside its place and renamed when complete, one process at a time; what
a killed one has left is removed by the next.
"""

import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np

from ilm_jax.data import storage
from ilm_jax.types import UserError

VERSION = '1.0.0'
NAME = 'token_sequences'  # the folder that TFDS derives from the name of the builder


@functools.cache
def _builder():
  """The builder's class; TFDS takes a second to import."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class TokenSequences(tfds.core.GeneratorBasedBuilder):
    """Sequences of small ids, in the order in which `make()` yields them."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # nothing beside the code belongs to it, and the search needs a package that TFDS does not install

    def __init__(self, *, make=None, **settings):
      self.make = make
      super().__init__(**settings, file_format='array_record')

    def _info(self):
      features = tfds.features.FeaturesDict({'tokens': tfds.features.Tensor(shape=(None,), dtype=np.uint8)})
      return tfds.core.DatasetInfo(
        builder=self, description='Token sequences.', features=features, disable_shuffling=True
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {'examples': self._generate_examples()}

    def _generate_examples(self):
      with contextlib.closing(self.make()) as examples:
        for index, tokens in enumerate(examples):
          yield index, {'tokens': np.asarray(tokens, np.uint8)}

  return TokenSequences


class Prepared:
  """Random access to prepared sequences; workers open the files again."""

  def __init__(self, folder: str, name: str):
    self.folder, self.name = folder, name
    self._data = _open(folder, name).as_data_source('examples')

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> np.ndarray:
    return self._data[index]['tokens']

  def __reduce__(self):
    return Prepared, (self.folder, self.name)


def _written(builder) -> None:
  """Prepare; what the writer of array_record raises when it cannot write (a RuntimeError) is an OSError.

  TFDS announces itself on standard output, and wants a folder for downloads that there are none of.
  """
  wrong, make = [], builder.make

  def watched():
    try:
      yield from make()
    except Exception as error:  # of what is written, not of the writer
      wrong.append(error)
      raise

  builder.make = watched
  try:
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
      builder.download_and_prepare(download_dir=downloads)
  except RuntimeError as error:
    if wrong:
      raise
    raise OSError(' '.join(str(error).split())) from error


def _open(folder: str, name: str, make=None):
  return _builder()(make=make, data_dir=str(pathlib.Path(folder, name)))


def prepared(folder: str, name: str, make) -> Prepared:
  """Open prepared sequences; make them first when they are not there.

  Args:
    folder: holds all of them; made if need be.
    name: everything that decides these, in letters that a file name may have.
    make: a function without arguments that returns a generator of the sequences (arrays of ids below 256).

  Raises:
    UserError: the folder can't be written.
  """
  folder = str(pathlib.Path(folder).expanduser())
  place = pathlib.Path(folder, name, NAME)
  whole = place / VERSION / 'dataset_info.json'
  if not whole.exists():
    try:
      place.mkdir(parents=True, exist_ok=True)
      with storage.locked(place) as alone:
        if not whole.exists():
          for stale in place.glob('incomplete.*') if alone else ():
            shutil.rmtree(stale)
          _written(_open(folder, name, make))
    except OSError as error:
      if not whole.exists():  # without locks, another may have been first, with the same
        raise UserError(
          f'task.cache={folder} could not be written ({error.strerror or error}): make room, or name another folder'
        ) from error
  return Prepared(folder, name)


# --- documents --------------------------------------------------------------------------------------------------------

COUNTS = 'counts.json'


@functools.cache
def _documents():
  """The class of the builder of documents."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class Documents(tfds.core.GeneratorBasedBuilder):
    """Documents with their tokens, in the order that TFDS gives them: the same one wherever they are prepared."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None

    def __init__(self, *, make=None, **settings):
      self.make = make
      super().__init__(**settings, file_format='array_record')

    def _info(self):
      features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'tokens': tfds.features.Text()})
      return tfds.core.DatasetInfo(builder=self, description='Documents.', features=features)

    def _split_generators(self, dl_manager):
      del dl_manager
      return {'examples': self._generate_examples()}

    def _generate_examples(self):
      with contextlib.closing(self.make()) as examples:
        for index, (text, tokens) in enumerate(examples):
          yield index, {'text': text, 'tokens': np.asarray(tokens, '<u4').tobytes()}

  return Documents


class Documents:
  """Random access to prepared documents; workers open the files again. `counts` is what was counted on the way."""

  def __init__(self, place: pathlib.Path):
    self.place = place
    try:
      self.counts = json.loads((place / COUNTS).read_text())
      self._data = _documents()(data_dir=str(place)).as_data_source('examples')
      self._size = len(self._data)
    except Exception as error:  # the libraries raise many types
      raise self._damaged(error) from error

  def __len__(self) -> int:
    return self._size

  def tokens(self, index: int) -> np.ndarray:
    """The ids of a document, int32."""
    return np.frombuffer(self._read(index)['tokens'], '<u4').astype(np.int32)

  def text(self, index: int) -> str:
    """A document as it was read."""
    return self._read(index)['text'].decode()

  def _read(self, index: int) -> dict:
    if not 0 <= index < self._size:
      raise IndexError(index)
    try:
      record = self._data[index]
    except Exception as error:
      raise self._damaged(error) from error
    if record['text'] is None or record['tokens'] is None:
      raise self._damaged(ValueError(f'record {index} is empty'))
    return record

  def _damaged(self, error: Exception) -> UserError:
    return UserError(
      f'the prepared documents in {self.place} cannot be read ({" ".join(str(error).split())[:120]}): remove that '
      'folder and start the same command again, which makes it anew'
    )

  def __reduce__(self):
    return Documents, (self.place,)


def documents(folder, name: str, make) -> Documents:
  """Open prepared documents; make them first when they are not there.

  Args:
    folder: holds all of them, local or a bucket (see `storage`); made if need be.
    name: everything that decides these, in letters that a file name may have.
    make: called with a dict, which it may fill with counts; returns a generator of (text, ids).

  Raises:
    UserError: the folder can't be written, or what is in it can't be read.
  """

  def fill(place: pathlib.Path):
    counts = {}
    _written(_documents()(make=lambda: make(counts), data_dir=str(place)))
    (place / COUNTS).write_text(json.dumps(counts) + '\n')

  return Documents(storage.once(folder, name, fill))
