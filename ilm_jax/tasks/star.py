"""Star graphs (Bachmann & Nagarajan 2024, and the variable-arm version of arXiv 2505.05755): find the path.

Several directed arms meet in one node. The prompt lists all edges in random order, then source and goal; the answer is
the path from source to goal, as edges: `[CLS] u v u v ... source goal [BOS] p1 p2 p2 p3 ...`, node k as id 7 + k.

As text (prompts and output): `u,v|u,v|...|u,v/source,goal=p1,p2,...,pL`.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from ilm_jax.data.tokenizers import WordTokenizer
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.tasks.contract import Task
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
OFFSET = len(SPECIAL)
TRIES = 10_000  # graphs drawn in search of one of a split


class Graph(NamedTuple):
  """Edges in the order of the prompt, and the path from source to goal."""

  edges: list[tuple[int, int]]
  path: list[int]


def make_graph(rng: np.random.Generator, cfg) -> Graph:
  """Draw a graph.

  Args:
    rng: its generator.
    cfg: `degree` arms of `min_length` to `max_length` nodes each, named by distinct numbers below `num_nodes`. The arms
      share one node, the junction: the first of every arm when `min_plan` is 0 (the symmetric graphs), else uniform
      such that at least `min_plan` nodes follow it. Arm 0 is the answer.
  """
  lengths = rng.integers(cfg.min_length, cfg.max_length, size=cfg.degree, endpoint=True)
  at = rng.integers(0, lengths - cfg.min_plan) if cfg.min_plan else np.zeros(cfg.degree, int)
  names = rng.permutation(cfg.num_nodes)[: lengths.sum() - cfg.degree + 1].tolist()
  junction, rest = names[0], iter(names[1:])
  arms = [
    [junction if i == where else next(rest) for i in range(length)]
    for length, where in zip(lengths.tolist(), at.tolist(), strict=True)
  ]
  edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
  return Graph([edges[i] for i in rng.permutation(len(edges))], arms[0])


def split_of(graph: Graph) -> str:
  """The split of a graph's identity (edge set, source, goal): 5 % validation, 5 % test, decided by a hash."""
  identity = repr((sorted(graph.edges), graph.path[0], graph.path[-1])).encode()
  bucket = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), 'big') % 20
  return {0: 'validation', 1: 'test'}.get(bucket, 'train')


def longest_answer(cfg) -> int:
  """Tokens of the longest path, as edges."""
  return 2 * (cfg.max_length - 1)


def longest(cfg) -> int:
  """Tokens of the longest example: [CLS], edges, source, goal, [BOS], path."""
  return 2 * cfg.degree * (cfg.max_length - 1) + 4 + longest_answer(cfg)


def check(cfg) -> None:
  """Refuse settings from which no graph can be drawn."""
  if cfg.get('order', 'path') not in ('path', 'oracle'):
    raise UserError(f'task.order={cfg.order!r}: expected path, or oracle (the path backwards)')
  needed = cfg.degree * (cfg.max_length - 1) + 1
  if cfg.num_nodes < needed:
    raise UserError(f'task.num_nodes={cfg.num_nodes}: {cfg.degree} arms of {cfg.max_length} nodes need {needed} names')
  if not 2 <= cfg.min_length <= cfg.max_length or cfg.degree < 1 or not 0 <= cfg.min_plan < cfg.min_length:
    raise UserError(
      f'task: expected degree >= 1, 2 <= min_length <= max_length and 0 <= min_plan < min_length, got degree='
      f'{cfg.degree}, min_length={cfg.min_length}, max_length={cfg.max_length}, min_plan={cfg.min_plan}'
    )


class Source:
  """Random access to the graphs of one split: graph i is a function of (cfg.seed, split, i) alone, kept once made."""

  def __init__(self, cfg, split: str):
    check(cfg)
    self.cfg, self.split = cfg, split
    self.size = {'train': cfg.num_train, 'validation': cfg.num_validation, 'test': cfg.num_test}[split]
    self.endless = split == 'train' and not cfg.num_train
    self._kept = {}

  def __len__(self) -> int:
    return 2**62 if self.endless else self.size

  def graph(self, index: int) -> Graph:
    """Draw graphs until one belongs to the split."""
    rng = np.random.default_rng((self.cfg.seed, SPLITS.index(self.split), index))
    for _ in range(TRIES):
      graph = make_graph(rng, self.cfg)
      if split_of(graph) == self.split:
        return graph
    raise UserError(f'task: {TRIES} graphs drawn, none of the {self.split} split: there are too few different ones; '
                    'raise task.num_nodes, task.degree or task.max_length')  # fmt: skip

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if index in self._kept:
      return self._kept[index]
    example = encode(self.graph(index), backwards=is_reversed(self.cfg))
    if not self.endless:
      self._kept[index] = example
    return example


source = Source


def encode(graph: Graph, backwards: bool = False) -> dict[str, np.ndarray]:
  """A graph as an example: everything up to [BOS] is fixed. Backwards: the tokens of the answer in reverse."""
  prompt = _prompt_ids(graph.edges, graph.path[0], graph.path[-1])
  answer = [OFFSET + node for edge in itertools.pairwise(graph.path) for node in edge]
  if backwards:
    answer.reverse()
  tokens = np.array(prompt + answer, np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt)}


def _prompt_ids(edges, start: int, goal: int) -> list[int]:
  return [CLS] + [OFFSET + node for pair in [*edges, (start, goal)] for node in pair] + [BOS]


def tokenizer(cfg) -> WordTokenizer:
  """Node numbers as words."""
  return WordTokenizer(str(node) for node in range(cfg.num_nodes))


def score(predicted: np.ndarray, reference: np.ndarray, cfg) -> dict[str, tuple[float, float]]:
  """Compare free tokens: `exact_match` of the sequence, and `token_accuracy` over the reference's positions."""
  del cfg
  common = min(len(predicted), len(reference))
  right = int((predicted[:common] == reference[:common]).sum())
  return {
    'exact_match': (float(np.array_equal(predicted, reference)), 1.0),
    'token_accuracy': (float(right), float(len(reference))),
  }


def chance(cfg) -> float:
  """A random arm at the junction."""
  return 1 / cfg.degree


def landmark(tokens, cfg) -> int | None:
  """Index in the answer of the node behind the junction: the choice of an arm. None where the answer lacks it."""
  ids = [int(token) for token in tokens]
  bos = ids.index(BOS)
  answer = ids[bos + 1 :]
  if is_reversed(cfg):
    answer = answer[::-1]
  starts = ids[1 : bos - 2 : 2]
  junction = max(set(starts), key=starts.count, default=None)
  for i in range(0, len(answer) - 1, 2):
    if answer[i] == junction:
      return len(answer) - 2 - i if is_reversed(cfg) else i + 1
  return None


def is_reversed(cfg) -> bool:
  """Is the answer written from the goal to the source, the order in which every next node is determined?"""
  return cfg.get('order', 'path') == 'oracle'


def encode_prompt(text: str, cfg) -> list[int]:
  """The given tokens of `u,v|u,v|.../source,goal` (what follows a `=` is left out)."""
  words = tokenizer(cfg)
  try:
    edges, ends = text.split('=')[0].strip().split('/')
    pairs = [tuple(part.strip() for part in pair.split(',')) for pair in [*edges.split('|'), ends]]
    if any(len(pair) != 2 for pair in pairs):
      raise ValueError
  except ValueError:
    raise UserError(f'prompt {text.strip()!r}: expected edges and ends as u,v|u,v|.../source,goal') from None
  *edges, (start, goal) = [[i - OFFSET for i in words.ids(pair)] for pair in pairs]
  return _prompt_ids(edges, start, goal)


def decode(tokens, cfg) -> str:
  """A row as text; an answer that is no chain of edges is written edge by edge, `p1,p2|p3,p4`."""
  words = tokenizer(cfg).pieces(tokens)
  bos = words.index('[BOS]')
  prompt, answer = words[1:bos], words[bos + 1 :]
  if is_reversed(cfg):
    answer = answer[::-1]
  pairs = [','.join(prompt[i : i + 2]) for i in range(0, len(prompt), 2)]
  chained = len(answer) % 2 == 0 and answer[1:-1:2] == answer[2::2]
  if chained:
    path = ','.join(answer[:1] + answer[1::2])
  else:
    path = '|'.join(','.join(answer[i : i + 2]) for i in range(0, len(answer), 2))
  return '|'.join(pairs[:-1]) + '/' + pairs[-1] + '=' + path


TASK = Task(
  name='star',
  tokenizer=tokenizer,
  source=Source,
  longest=longest,
  longest_answer=longest_answer,
  encode_prompt=encode_prompt,
  decode=decode,
  score=score,
  chance=chance,
  landmark=landmark,
)
