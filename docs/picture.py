"""Draw the insertion order of a completion as SVG, from a JSON line of `ilm_jax.generate` on standard input:

python -m ilm_jax.generate ... | python docs/picture.py > docs/insertion.svg
"""

import json
import sys
from html import escape

CELL, ROW, LEFT = 46, 34, 92
FILL = ('#dbe9f6', '#b9d6ee', '#8fbfe3', '#5fa3d4', '#3583bf', '#14609f', '#0a4480', '#06305c')


def draw(record: dict) -> str:
  """Return an SVG image with one row per decoding step: the tokens so far, coloured by step, the new token framed."""
  inserted = [(token, step) for token, step in zip(record['tokens'], record['order'], strict=True) if step >= 0]
  steps = len(inserted)
  width, height = LEFT + CELL * steps + 250, ROW * (steps + 1) + 64
  out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="15">',
    f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    f'<text x="12" y="26" fill="#444444">{escape(record["prompt"])}</text>',
  ]
  for done in range(steps + 1):
    y = 48 + ROW * done
    label = 'start' if done == 0 else f'step {done}'
    out.append(f'<text x="12" y="{y + 20}" fill="#666666">{label}</text>')
    shown = [(token, step) for token, step in inserted if step < done]
    for column, (token, step) in enumerate(shown):
      x, new = LEFT + CELL * column, step == done - 1
      dark = step * len(FILL) // steps >= 4
      out.append(
        f'<rect x="{x}" y="{y}" width="{CELL - 6}" height="{ROW - 6}" rx="5" fill="{FILL[step * len(FILL) // steps]}"'
        + (' stroke="#d1495b" stroke-width="2.5"/>' if new else '/>')
      )
      out.append(
        f'<text x="{x + (CELL - 6) / 2}" y="{y + 20}" text-anchor="middle" fill="{"#ffffff" if dark else "#111111"}">'
        f'{escape(token)}</text>'
      )
    stop = record['stop_probabilities'][done] if done < len(record['stop_probabilities']) else None
    if stop is not None:
      out.append(f'<text x="{LEFT + CELL * steps + 14}" y="{y + 20}" fill="#666666">p(stop) = {stop:.3f}</text>')
  return '\n'.join([*out, '</svg>']) + '\n'


if __name__ == '__main__':
  sys.stdout.write(draw(json.loads(sys.stdin.readline())))
