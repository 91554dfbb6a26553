"""Token sequences prepared on disk: a TFDS builder that writes ArrayRecord files and needs no TensorFlow.

A preparation is whole or absent: it is written beside its place and renamed when complete, one process at a time; what
a killed one has left is removed by the next.
"""

import contextlib
import fcntl
import functools
import io
import pathlib
import shutil
import tempfile

import numpy as np

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
      with (place / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed, or the process ends
        if not whole.exists():
          for stale in place.glob('incomplete.*'):
            shutil.rmtree(stale)
          # TFDS announces itself on standard output, and wants a folder for downloads that there are none of.
          with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            _open(folder, name, make).download_and_prepare(download_dir=downloads)
    except OSError as error:
      raise UserError(
        f'task.cache={folder} could not be written ({error.strerror or error}): make room, or name another folder'
      ) from error
  return Prepared(folder, name)
