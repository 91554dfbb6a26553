"""Plots that `ilm-jax report` writes into the workdirs of runs: learning curves and decoding order."""

import json

import numpy as np
from etils import epath

from ilm_jax.evaluation import output
from ilm_jax.runs import logs
from ilm_jax.types import UserError


def plot(workdir: str) -> None:
  """Write the plots of a run: learning curve (accuracy.png or loss.png) and decoding order (order.png)."""
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError('the plots need matplotlib: pip install "ilm_jax[report]", or pass --noplots') from None
  figure = Figure(figsize=(6.4, 3.6), dpi=120)
  name = plot_learning_curve(figure, logs.read_scalars(workdir), str(workdir))
  _save(figure, workdir, name)
  if order_places := json.loads((epath.Path(workdir) / 'eval.json').read_bytes()).get('order_places'):
    figure = Figure(figsize=(4.4, 3.8), dpi=120)
    plot_order(figure, order_places, f'{workdir}: decoding order')
    _save(figure, workdir, 'order.png')


def plot_learning_curve(figure, scalars: dict, title: str) -> str:
  """Plot the training loss and validation accuracy (validation loss if there is none) by step; return a file name."""
  axis = figure.subplots()
  if has_answers := 'validation/exact_match' in scalars:
    for name, color in (('exact_match', '#14609f'), ('token_accuracy', '#3a7d44')):
      if points := scalars.get(f'validation/{name}'):
        steps, values = zip(*points, strict=True)
        axis.plot(steps, [100 * value for value in values], color=color, label=name.replace('_', ' '), marker='.')
    axis.set(ylabel='validation accuracy, %', ylim=(-2, 102))
  elif losses := scalars.get('validation/loss'):
    axis.plot(*zip(*losses, strict=True), color='#14609f', label='validation loss', marker='.')
    axis.set(ylabel='loss')
  axis.set(xlabel='training steps')
  if points := scalars.get('train/loss'):
    loss_axis = axis.twinx() if has_answers else axis
    loss_axis.plot(*zip(*points, strict=True), color='#999999', linewidth=0.8, label='training loss', zorder=0)
    if has_answers:
      loss_axis.set(ylabel='training loss (gray)', ylim=(0, None))
  if axis.get_legend_handles_labels()[0]:  # empty if the run has no event files
    axis.legend(loc='center right' if has_answers else 'upper right', frameon=False)
  axis.set_title(title, fontsize=9)
  return 'accuracy.png' if has_answers else 'loss.png'


def plot_order(figure, order_places, title: str) -> None:
  """Plot at which answer positions each decoding step inserts; `order_places` counts tokens by [step, position]."""
  axis = figure.subplots()
  share = np.array(order_places) / np.maximum(np.sum(order_places, axis=1, keepdims=True), 1)
  image = axis.imshow(share, cmap='Blues', vmin=0, vmax=1, aspect='auto')
  axis.set(xlabel='position in the answer', ylabel='decoding step')
  axis.set_title(title, fontsize=9)
  figure.colorbar(image, label='share of the tokens of a step')


def _save(figure, workdir: str, name: str) -> None:
  figure.tight_layout()
  path = epath.Path(workdir) / name
  with output.replacing(path, str(path)) as file:
    figure.savefig(file, format='png')
