"""Star graphs: given the shuffled edges of a graph, a source and a goal, write the path between them.

From Bachmann & Nagarajan 2024; the variant with arms of different lengths is from arXiv 2505.05755. A graph consists
of several directed paths (arms) that meet in one node (the junction). The prompt lists all edges in random order, then
the source and the goal; the answer lists the edges of the path: `[CLS] u v u v ... source goal [BOS] p1 p2 p2 p3 ...`.
The token id of node k is 7 + k.

Text form of prompts and answers: `u,v|u,v|...|u,v/source,goal=p1,p2,...,pL`.
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
FIRST_NODE_ID = len(SPECIAL)  # token id of node 0
MAX_NODES = 1_000_000  # largest task.num_nodes; every example permutes all nodes
MAX_DRAWS = 10_000  # maximum number of random graphs to draw until one belongs to the requested split


class Graph(NamedTuple):
  """A graph: its edges, in the order of the prompt, and the nodes of the path from source to goal."""

  edges: list[tuple[int, int]]
  path: list[int]


def make_graph(rng: np.random.Generator, cfg) -> Graph:
  """Draw a random star graph; its path is the first arm drawn.

  The graph has `degree` arms of `min_length` to `max_length` nodes, which are distinct numbers below `num_nodes`. All
  arms contain the junction. With `min_plan=0`, it is the first node of every arm (a symmetric graph). Otherwise, its
  index in each arm is uniform, but at least `min_plan` nodes of the arm follow it.
  """
  lengths = rng.integers(cfg.min_length, cfg.max_length, size=cfg.degree, endpoint=True)
  junction_indices = rng.integers(0, lengths - cfg.min_plan) if cfg.min_plan else np.zeros(cfg.degree, int)
  names = rng.permutation(cfg.num_nodes)[: lengths.sum() - cfg.degree + 1].tolist()
  junction, other_names = names[0], iter(names[1:])
  arms = [
    [junction if i == junction_index else next(other_names) for i in range(length)]
    for length, junction_index in zip(lengths.tolist(), junction_indices.tolist(), strict=True)
  ]
  edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
  return Graph([edges[i] for i in rng.permutation(len(edges))], arms[0])


def split_of(graph: Graph) -> str:
  """Return the split of a graph, by a hash of edge set, source and goal: 5 % validation, 5 % test, 90 % training."""
  identity = repr((sorted(graph.edges), graph.path[0], graph.path[-1])).encode()
  bucket = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), 'big') % 20
  return {0: 'validation', 1: 'test'}.get(bucket, 'train')


def check_config(cfg) -> None:
  """Raise UserError if the task settings are invalid or leave too few node names for a graph."""
  if cfg.get('order', 'path') not in ('path', 'oracle'):
    raise UserError(f'task.order={cfg.order!r}: expected path, or oracle (the path from goal to source)')
  needed = cfg.degree * (cfg.max_length - 1) + 1
  if not needed <= cfg.num_nodes <= MAX_NODES:
    raise UserError(f'task.num_nodes={cfg.num_nodes}: {cfg.degree} arms of {cfg.max_length} nodes need {needed} nodes, '
                    f'and at most {MAX_NODES:,} are allowed')  # fmt: skip
  if not 2 <= cfg.min_length <= cfg.max_length or cfg.degree < 1 or not 0 <= cfg.min_plan < cfg.min_length:
    found = ', '.join(f'{name}={cfg[name]}' for name in ('degree', 'min_length', 'max_length', 'min_plan'))
    expected = 'degree >= 1, 2 <= min_length <= max_length and 0 <= min_plan < min_length'
    raise UserError(f'task: expected {expected}, got {found}')


class Source:
  """Random access to the star graph examples of one split; examples of a finite split are cached in memory."""

  def __init__(self, cfg, split: str):
    check_config(cfg)
    self.cfg, self.split = cfg, split
    self.endless = split == 'train' and not cfg.num_train
    self._examples = {}

  def __len__(self) -> int:
    return 2**62 if self.endless else self.cfg[f'num_{self.split}']

  def graph(self, index: int) -> Graph:
    """Return the graph of example `index`: the first random graph that belongs to the split."""
    rng = np.random.default_rng((self.cfg.seed, SPLITS.index(self.split), index))
    for _ in range(MAX_DRAWS):
      if split_of(graph := make_graph(rng, self.cfg)) == self.split:
        return graph
    raise UserError(f'task: none of {MAX_DRAWS} random graphs belongs to the {self.split} split: too few different '
                    'graphs exist; raise task.num_nodes, task.degree or task.max_length')  # fmt: skip

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    example = self._examples.get(index) or encode(self.graph(index), backwards=is_reversed(self.cfg))
    if not self.endless:
      self._examples[index] = example
    return example


def encode(graph: Graph, backwards: bool = False) -> dict[str, np.ndarray]:
  """Encode a graph as an example; tokens up to and including [BOS] are fixed. `backwards` reverses the answer."""
  prompt = _prompt_ids(graph.edges, graph.path[0], graph.path[-1])
  answer = [FIRST_NODE_ID + node for edge in itertools.pairwise(graph.path) for node in edge]
  tokens = np.array(prompt + (answer[::-1] if backwards else answer), np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt)}


def _prompt_ids(edges, start: int, goal: int) -> list[int]:
  return [CLS] + [FIRST_NODE_ID + node for pair in [*edges, (start, goal)] for node in pair] + [BOS]


def tokenizer(cfg) -> WordTokenizer:
  """Return the star graph tokenizer, whose words are the node numbers."""
  return WordTokenizer(str(node) for node in range(cfg.num_nodes))


def score(predicted: np.ndarray, reference: np.ndarray, cfg) -> dict[str, tuple[float, float]]:
  """Return {metric: (total, weight)}: `exact_match`, and `token_accuracy` over the positions of the reference."""
  num_correct = sum(a == b for a, b in zip(predicted, reference, strict=False))
  return {
    'exact_match': (float(np.array_equal(predicted, reference)), 1.0),
    'token_accuracy': (float(num_correct), float(len(reference))),
  }


def landmark(tokens, cfg) -> int | None:
  """Return the answer index of the node after the junction, which determines the arm; None if there is no such node."""
  ids = [int(token) for token in tokens]
  bos = ids.index(BOS)
  answer = ids[:bos:-1] if is_reversed(cfg) else ids[bos + 1 :]
  edge_starts = ids[1 : bos - 2 : 2]
  junction = max(set(edge_starts), key=edge_starts.count, default=None)
  for i in range(0, len(answer) - 1, 2):
    if answer[i] == junction:
      return len(answer) - 2 - i if is_reversed(cfg) else i + 1
  return None


def is_reversed(cfg) -> bool:
  """Return whether answers are written backwards, from the goal to the source (`task.order=oracle`)."""
  return cfg.get('order', 'path') == 'oracle'


def encode_prompt(text: str, cfg) -> list[int]:
  """Return the token ids of a prompt `u,v|u,v|.../source,goal`; an answer after `=` is ignored."""
  words = tokenizer(cfg)
  try:
    edges, ends = text.split('=')[0].strip().split('/')
    pairs = [tuple(part.strip() for part in pair.split(',')) for pair in [*edges.split('|'), ends]]
    if any(len(pair) != 2 for pair in pairs):
      raise ValueError
  except ValueError:
    raise UserError(f'prompt {text.strip()!r}: expected edges, source and goal as u,v|u,v|.../source,goal') from None
  *edges, (start, goal) = [[i - FIRST_NODE_ID for i in words.ids(pair)] for pair in pairs]
  return _prompt_ids(edges, start, goal)


def decode(tokens, cfg) -> str:
  """Return the text of a prompt and its answer; if the answer is not a path, its edges are written `p1,p2|p3,p4`."""
  words = tokenizer(cfg).pieces(tokens)
  bos = words.index('[BOS]')
  answer = words[:bos:-1] if is_reversed(cfg) else words[bos + 1 :]

  def pairs(nodes):
    return [','.join(nodes[i : i + 2]) for i in range(0, len(nodes), 2)]

  *edges, ends = pairs(words[1:bos])
  is_path = len(answer) % 2 == 0 and answer[1:-1:2] == answer[2::2]
  path = ','.join(answer[:1] + answer[1::2]) if is_path else '|'.join(pairs(answer))
  return '|'.join(edges) + '/' + ends + '=' + path


TASK = Task(
  name='star', tokenizer=tokenizer, source=Source, encode_prompt=encode_prompt, decode=decode, score=score,
  longest=lambda cfg: 2 * (cfg.degree + 1) * (cfg.max_length - 1) + 4,  # 2 for each edge of arms and answer, 4 others
  longest_answer=lambda cfg: 2 * (cfg.max_length - 1),  # two tokens for each edge of the path
  chance=lambda cfg: 1 / cfg.degree,  # probability that a random arm at the junction is right
  landmark=landmark,
)  # fmt: skip
