"""Variant of `ilm_jax.main` that saves each training batch in folder $SEEN and hangs after step $HOLD until killed."""

import os
import pathlib
import time

import numpy as np

import ilm_jax.main
from ilm_jax.data import pipeline

train_batches = pipeline.train_batches


def watched(source, corrupt, cfg, *, start, stop, part):
  """Yield the batches of `pipeline.train_batches`, and save each as STEP-PROCESS.npz."""
  folder, hold = pathlib.Path(os.environ['SEEN']), int(os.environ['HOLD'])
  folder.mkdir(parents=True, exist_ok=True)
  batches = train_batches(source, corrupt, cfg, start=start, stop=stop, part=part)
  for step, batch in enumerate(batches, start + 1):
    np.savez(folder / f'{step}-{part[0]}.npz', **batch)
    yield batch
    while step == hold:
      time.sleep(1)


def main() -> int:
  """Run `ilm_jax.main` with every training batch saved; return its exit code."""
  pipeline.train_batches = watched
  return ilm_jax.main.main()
