"""`ilm_jax.main` that leaves each training batch it takes in the folder $SEEN; at step $HOLD it waits to be killed."""

import os
import pathlib
import sys
import time

import numpy as np

import ilm_jax.main
from ilm_jax.data import pipeline

read = pipeline.train_batches


def watched(source, corrupt, cfg, *, start, stop, part):
  folder, hold = pathlib.Path(os.environ['SEEN']), int(os.environ['HOLD'])
  folder.mkdir(parents=True, exist_ok=True)
  for step, batch in enumerate(read(source, corrupt, cfg, start=start, stop=stop, part=part), start + 1):
    np.savez(folder / f'{step}-{part[0]}.npz', **batch)
    yield batch
    while step == hold:
      time.sleep(1)


if __name__ == '__main__':
  pipeline.train_batches = watched
  sys.exit(ilm_jax.main.main())
