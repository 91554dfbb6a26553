"""Traces: a self-contained HTML page that animates how a text was generated, with the probability of each insertion."""

import difflib
import html
import importlib.resources
import itertools
import json
import math
import re


def edits(old: str, new: str, start: int) -> list[tuple[int, int, str]]:
  """Return the edits (offset, number of characters removed, text inserted), last one first, that turn `old` into `new`.

  An insertion that is possible at several offsets ('a' into 'aa') is made as close to the offset `start` as possible.
  """
  shortest, prefix, suffix = min(len(old), len(new)), common_prefix(old, new), common_prefix(old[::-1], new[::-1])
  at = min(max(start, shortest - suffix), prefix)
  suffix = min(suffix, shortest - at)
  old, new = old[at : len(old) - suffix], new[at : len(new) - suffix]
  if not old:
    return [(at, 0, new)]
  codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
  return [(at + i, j - i, new[k:end]) for tag, i, j, k, end in reversed(codes) if tag != 'equal']


def star_characters(text: str, steps: list[int]) -> list[tuple[str, int | None]]:
  """Return the characters of a star graph's text, each with the step that inserted it; prompt and separators have None.

  `steps` are the steps of the answer's tokens, in the order of the text. If the answer is a path, one node of the text
  stands for two tokens, the end of an edge and the start of the next one; it gets the later of their steps.
  """
  prompt, equals, answer = text.partition('=')
  parts = re.split('([,|])', answer)
  if len(parts[::2]) < len(steps):
    steps = [max(steps[max(i - 1, 0) : i + 1]) for i in range(0, len(steps) + 1, 2)]
  owners = [None if i % 2 else steps[i // 2] for i in range(len(parts) if steps else 0)]
  owned = zip(parts, owners, strict=False)
  return [(one, None) for one in prompt + equals] + [(one, owner) for part, owner in owned for one in part]


def star_edits(old: list[tuple], new: list[tuple]) -> list[tuple[int, int, str, int | None]]:
  """Return the edits (offset, number of characters removed, text inserted, its step) between two `star_characters`."""
  made = []
  for tag, i, j, k, end in reversed(difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()):
    if tag != 'equal':
      made += [(i, j - i, '', None)] * (j > i)
      runs = [(step, ''.join(one for one, _ in run)) for step, run in itertools.groupby(new[k:end], lambda one: one[1])]
      made += [(i, 0, text, step) for step, text in reversed(runs)]
  return made


def common_prefix(one: str, other: str) -> int:
  """Return the length of the longest common prefix of two strings."""
  return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def record(result, parts: list[str], decode, graph: dict | None = None) -> dict:
  """Return the data with which the page animates a Generation or Infilling.

  `parts` is the given text around the gaps, and decode(present), with a bool for each token, returns the text in each
  gap if only these tokens are present. So the page shows, after every step, the text that the present tokens stand for.
  """
  present = [step < 0 for step in result.order]
  # gap_of_place: {number of given tokens to the left of a gap: index of the gap}
  texts, tokens, gap_of_place = decode(present), [], {}
  owners = [[-1] * len(text) for text in texts]  # for each character of each gap, the index of the token it belongs to
  start = texts
  characters = graph and star_characters(texts[0], [])
  for step, index in sorted((step, index) for index, step in enumerate(result.order) if step >= 0):
    left = max(i for i in range(index) if present[i])
    present[index], before, changes = True, texts, []
    texts = decode(present)
    for gap, (old, new) in enumerate(zip(before, texts, strict=True)):
      if graph:
        steps = [order for order, there in zip(result.order, present, strict=True) if there and order >= 0]
        old, characters = characters, star_characters(new, steps[::-1] if graph['backwards'] else steps)
        changes += [[gap, *edit] for edit in star_edits(old, characters)]
      elif old != new:
        first = 1 + max((at for at, owner in enumerate(owners[gap]) if owner < index), default=-1)
        for at, removed, text in edits(old, new, first):
          owners[gap][at : at + removed] = [index] * len(text)
          changes.append([gap, at, removed, text, step])
    place = sum(other < 0 for other in result.order[:index])
    if changes:
      gap_of_place[place] = changes[0][0]
    names = {'token': result.tokens[index], 'after': result.tokens[left]}
    tokens.append({'step': step, **names, 'edits': changes, 'gap': place})
  tokens = [{**token, 'gap': gap_of_place.get(token['gap'])} for token in tokens]
  return {
    'name': result.text[:60],
    'parts': parts,
    'start': start,
    'tokens': tokens,
    'steps': max([*result.order, -1]) + 1,
    'probabilities': result.probabilities,
    'stop': result.stop_probabilities,
    'stopped': result.stopped,
    'graph': graph,
  }


def star_graph(result, backwards: bool) -> dict:
  """Return the graph of a star graph prompt, and the nodes of its answer with the steps that inserted them."""
  start = result.tokens.index('[BOS]')
  nodes, answer = result.tokens[1:start], list(zip(result.tokens, result.order, strict=True))[start + 1 :]
  *edges, (source, goal) = zip(nodes[::2], nodes[1::2], strict=True)
  path, places = answer[::-1] if backwards else answer, layout(edges, source, goal)
  return {'edges': edges, 'source': source, 'goal': goal, 'path': path, 'places': places, 'backwards': backwards}


def layout(edges: list[tuple[str, str]], source: str, goal: str) -> dict[str, tuple[float, float]]:
  """Return {node: (column, row)} for drawing a star graph; each arm has a row of its own, so that no edges cross.

  Columns count edges from the junction: forward to the right, backward to the left. Nodes without a connection to the
  junction get columns at the right end of the last row. Graphs whose nodes would overlap are drawn as a circle.
  """
  starts, ends = [start for start, _ in edges], [node for edge in edges for node in edge]
  nodes = list(dict.fromkeys([*ends, source, goal]))
  junction = max(nodes, key=lambda node: (starts.count(node), ends.count(node)))
  found = {junction: (0, 0, 0)}  # {node: (column, row, side)}; the side is -1 left of the junction, 1 right of it
  num_rows = {-1: 0, 0: 1, 1: 0}  # {side: number of its rows so far}
  for node in (queue := [junction]):
    (column, row, _), has_heir = found[node], {-1: node == junction, 1: node == junction}
    for start, end in edges:
      following, step = (end, 1) if start == node else (start, -1)
      if node not in (start, end) or following in found:
        continue
      side = int(math.copysign(1, column + step or step))
      found[following] = (column + step, num_rows[side] if has_heir[side] else row, side)
      num_rows[side] += has_heir[side]
      has_heir[side] = True
      queue.append(following)
  most = max(num_rows.values())
  places = {node: (column, row + (most - num_rows[side]) / 2) for node, (column, row, side) in found.items()}
  last_column, apart = max(column for column, _ in places.values()), [node for node in nodes if node not in found]
  places.update({node: (last_column + 1 + i, most - 1) for i, node in enumerate(apart)})
  points = sorted(places.values())
  if any(one[0] == other[0] and other[1] - one[1] < 0.9 for one, other in itertools.pairwise(points)):
    radius, angles = max(1, len(nodes) / 6), [2 * math.pi * i / len(nodes) for i in range(len(nodes))]
    turned = zip(nodes, angles, strict=True)
    places = {node: (radius * (1 - math.cos(angle)), radius * (1 - math.sin(angle))) for node, angle in turned}
  return places


def page(records: list[dict], title: str = 'Insertion by insertion') -> str:
  """Return an HTML page that animates one or several records, made by `record`; the page needs no network access."""
  data = json.dumps(records, ensure_ascii=False).replace('<', '\\u003c')
  template = importlib.resources.files('ilm_jax.inference').joinpath('trace.html').read_text(encoding='utf-8')
  return template.replace('@TITLE@', html.escape(title)).replace('@DATA@', data)
