"""Plot validation accuracy and training loss of runs as SVG: `python docs/curve.py WORKDIR ... > docs/easy.svg`."""

import sys
from html import escape
from pathlib import Path

from ilm_jax.runs import logs

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 52, 52, 20, 44
COLOURS = ('#14609f', '#d1495b', '#3a7d44', '#8a5a9e', '#c77f1a')


def path(points, max_x, max_y) -> str:
  """Return the SVG path data of a curve; the plot shows the ranges [0, max_x] and [0, max_y]."""
  width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
  pixels = [(LEFT + width * x / max_x, TOP + height * (1 - min(y, max_y) / max_y)) for x, y in points]
  return 'M' + ' L'.join(f'{x:.1f},{y:.1f}' for x, y in pixels)


def draw(runs: list[str]) -> str:
  """Return an SVG plot over training steps: accuracy in % (left axis), loss (right axis), one colour per run."""
  scalars = [logs.read_scalars(run) for run in runs]
  max_step = max(step for values in scalars for step, _ in values['train/loss'])
  max_loss = max(loss for values in scalars for _, loss in values['train/loss'])
  out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
  ]
  for quarter in range(5):
    y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - quarter / 4)
    x = LEFT + (WIDTH - LEFT - RIGHT) * quarter / 4
    out += [
      f'<path d="M{LEFT},{y} L{WIDTH - RIGHT},{y}" stroke="#dddddd"/>',
      f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{25 * quarter} %</text>',
      f'<text x="{WIDTH - RIGHT + 6}" y="{y + 4}">{max_loss * quarter / 4:.1f}</text>',
      f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{max_step * quarter / 4:,.0f}</text>',
    ]
  for run, values, colour in zip(runs, scalars, COLOURS * len(runs), strict=False):
    accuracy = [(step, 100 * value) for step, value in values.get('validation/exact_match', [])]
    loss = path(values['train/loss'], max_step, max_loss)
    out.append(f'<path d="{loss}" fill="none" stroke="{colour}" opacity="0.45"/>')
    if accuracy:
      out.append(f'<path d="{path(accuracy, max_step, 100)}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
    y = TOP + (HEIGHT - TOP - BOTTOM) // 2 + 14 * runs.index(run)
    out.append(
      f'<text x="{WIDTH - RIGHT - 8}" y="{y}" text-anchor="end" fill="{colour}">{escape(Path(run).name)}</text>'
    )
  label = 'training steps; validation exact match (thick, left axis), training loss (thin, right axis)'
  out.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" fill="#333333">{label}</text>')
  return '\n'.join([*out, '</svg>']) + '\n'


if __name__ == '__main__':
  sys.stdout.write(draw(sys.argv[1:]))
