"""Tests of the star graph task: graphs (checked by search and by statistics), splits, text, scores and landmarks."""

import collections
import functools
import itertools
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.configs import star as star_config
from ilm_jax.tasks import star
from ilm_jax.types import UserError

CLS, BOS, FIRST = 1, 4, 7  # token ids; FIRST is the id of node 0


TASKS = {name: star_config.get_config(name).task for name in ('tiny', 'easy', 'medium', 'hard')}
# Config -> (minimum, maximum) number of prompt tokens (edges, source, goal) and (minimum, maximum) of answer tokens.
LENGTHS = {
  'tiny': ((14, 14), (6, 6)),
  'easy': ((26, 26), (8, 8)),
  'medium': ((14, 32), (4, 10)),
  'hard': ((52, 112), (10, 22)),
}


def changed(name, **changes):
  return ConfigDict({**TASKS[name].to_dict(), **changes})


@functools.cache
def graphs(name, number):
  rng = np.random.default_rng(0)
  return [star.make_graph(rng, TASKS[name]) for _ in range(number)]


def all_paths(edges, start, goal):
  """Return all paths from start to goal without a repeated node, by depth-first search."""
  successors = collections.defaultdict(list)
  for u, v in edges:
    successors[u].append(v)
  found, stack = [], [[start]]
  while stack:
    path = stack.pop()
    if path[-1] == goal:
      found.append(path)
    stack += [[*path, node] for node in successors[path[-1]] if node not in path]
  return found


def junction(graph):
  """Return the junction: in a graph with at least three arms, the only node with more than two edges."""
  num_edges = collections.Counter(node for edge in graph.edges for node in edge)
  (found,) = [node for node, number in num_edges.items() if number > 2]
  return found


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TASKS)
def test_a_graph_is_a_tree_with_one_path_from_source_to_goal(name):
  for graph in graphs(name, 200):
    assert all_paths(graph.edges, graph.path[0], graph.path[-1]) == [graph.path]
    nodes = {node for edge in graph.edges for node in edge}
    assert nodes <= set(range(TASKS[name].num_nodes))
    assert len(set(graph.edges)) == len(graph.edges) == len(nodes) - 1
    connected = {min(nodes)}
    for _ in nodes:
      connected |= {node for edge in graph.edges if set(edge) & connected for node in edge}
    assert connected == nodes


@pytest.mark.parametrize('name', TASKS)
def test_a_star_example_lists_edges_source_and_goal_and_then_the_edges_of_the_path(name):
  cfg = TASKS[name]
  (shortest_prompt, longest_prompt), (shortest_answer, longest_answer) = LENGTHS[name]
  answer_lengths = set()
  for graph in graphs(name, 200):
    example = star.encode(graph)
    tokens, fixed = example['tokens'].tolist(), example['fixed'].tolist()
    assert example['tokens'].dtype == np.int32 and example['fixed'].dtype == bool
    bos = tokens.index(BOS)
    prompt, answer = tokens[1:bos], tokens[bos + 1 :]
    assert tokens[0] == CLS and fixed == [True] * (bos + 1) + [False] * len(answer)
    nodes = [token - FIRST for token in prompt]
    assert list(zip(nodes[:-2:2], nodes[1:-2:2], strict=True)) == graph.edges
    assert nodes[-2:] == [graph.path[0], graph.path[-1]]
    path_edges = [(answer[i] - FIRST, answer[i + 1] - FIRST) for i in range(0, len(answer), 2)]
    assert path_edges == [(graph.path[i], graph.path[i + 1]) for i in range(len(graph.path) - 1)]
    assert shortest_prompt <= len(prompt) <= longest_prompt
    assert min(prompt + answer) >= FIRST and max(prompt + answer) < star.tokenizer(cfg).vocab_size
    answer_lengths.add(len(answer))
  assert answer_lengths == set(range(shortest_answer, longest_answer + 1, 2)), 'every allowed path length should occur'


def test_the_star_configs_have_the_expected_lengths_vocabulary_sizes_and_chance_accuracy():
  for name, cfg in TASKS.items():
    assert star.TASK.longest(cfg) == LENGTHS[name][0][1] + LENGTHS[name][1][1] + 2  # + 2: [CLS] and [BOS]
    assert star.TASK.longest_answer(cfg) == LENGTHS[name][1][1]
    assert star.TASK.chance(cfg) == 1 / cfg.degree
  assert [star.tokenizer(TASKS[name]).vocab_size for name in ('easy', 'medium', 'hard')] == [27, 27, 63]
  for name in ('tiny', 'mini', 'easy', 'medium', 'hard'):
    cfg = star_config.get_config(name)
    assert cfg.sampling.max_length == star.TASK.longest(cfg.task)


def test_all_arms_of_a_symmetric_graph_start_at_the_source():
  for graph in graphs('easy', 200):
    assert junction(graph) == graph.path[0]
    starts = collections.Counter(u for u, _ in graph.edges)
    assert starts[graph.path[0]] == 3 and len(graph.path) == 5
    goals = {v for _, v in graph.edges} - set(starts)
    assert len(goals) == 3 and graph.path[-1] in goals
    assert all(len(all_paths(graph.edges, graph.path[0], goal)[0]) == 5 for goal in goals)


def deviation(counts, probabilities):
  """Return Pearson's chi-squared statistic minus its mean, in units of its standard deviation."""
  number = sum(counts.values())
  assert set(counts) <= set(probabilities)
  statistic = sum((counts[key] - number * p) ** 2 / (number * p) for key, p in probabilities.items())
  return (statistic - len(probabilities) + 1) / math.sqrt(2 * (len(probabilities) - 1))


@pytest.mark.parametrize('name', ['medium', 'hard'])
def test_the_index_of_the_junction_in_an_arm_is_uniform(name):
  """At least `min_plan` nodes follow the junction; all indices that allow this are equally likely."""
  cfg = TASKS[name]
  counts = collections.Counter((len(g.path), g.path.index(junction(g))) for g in graphs(name, 4_000))
  lengths = range(cfg.min_length, cfg.max_length + 1)
  probabilities = {(n, j): 1 / len(lengths) / (n - cfg.min_plan) for n in lengths for j in range(n - cfg.min_plan)}
  assert abs(deviation(counts, probabilities)) < 4


@pytest.mark.parametrize('name', ['medium', 'hard'])
def test_arms_have_independent_lengths_and_junction_indices(name):
  """The number of edges has the variance of a sum of independent lengths; the junction's in-degree is binomial."""
  cfg = TASKS[name]
  num_edges = np.array([len(graph.edges) for graph in graphs(name, 4_000)])
  variance = cfg.degree * ((cfg.max_length - cfg.min_length + 1) ** 2 - 1) / 12
  mean = cfg.degree * ((cfg.min_length + cfg.max_length) / 2 - 1)
  assert abs(num_edges.mean() - mean) < 4 * math.sqrt(variance / 4_000)
  assert abs(num_edges.var() / variance - 1) < 4 * math.sqrt(2 / 4_000)

  lengths = range(cfg.min_length, cfg.max_length + 1)
  starts = np.mean([1 / (n - cfg.min_plan) for n in lengths])  # probability that an arm's first node is the junction
  binomial = {
    k: math.comb(cfg.degree, k) * (1 - starts) ** k * starts ** (cfg.degree - k) for k in range(cfg.degree + 1)
  }
  num_entering = collections.Counter(sum(v == junction(g) for _, v in g.edges) for g in graphs(name, 1_000))
  assert abs(deviation(num_entering, binomial)) < 4


def test_node_names_and_the_order_of_edges_are_uniform():
  sources = collections.Counter(graph.path[0] for graph in graphs('easy', 4_000))
  assert abs(deviation(sources, dict.fromkeys(range(20), 1 / 20))) < 4
  first_edge = collections.Counter(g.edges.index((g.path[0], g.path[1])) for g in graphs('easy', 4_000))
  assert abs(deviation(first_edge, dict.fromkeys(range(12), 1 / 12))) < 4


# --- the source -------------------------------------------------------------------------------------------------------


def test_training_validation_and_test_share_no_graph():
  """Only 120 graphs exist, and far more are drawn; if splits were not chosen by hash, each would have all graphs."""
  cfg = changed('tiny', min_length=3, max_length=3, num_nodes=5, num_train=1_500, num_validation=300, num_test=300)
  found = {}
  for split in star.SPLITS:
    source = star.Source(cfg, split)
    drawn = map(source.graph, range(len(source)))
    found[split] = {(frozenset(graph.edges), graph.path[0], graph.path[-1]) for graph in drawn}
  assert sum(map(len, found.values())) == len(set().union(*found.values())) == 120
  assert all(found.values())


def test_the_split_of_a_graph_ignores_the_order_of_its_edges():
  for graph in graphs('medium', 60):
    orders = [*itertools.islice(itertools.permutations(graph.edges), 9), graph.edges[::-1]]
    assert {star.split_of(star.Graph(list(edges), graph.path)) for edges in orders} == {star.split_of(graph)}


def test_five_percent_of_the_graphs_belong_to_validation_and_five_percent_to_test():
  counts = collections.Counter(map(star.split_of, graphs('hard', 4_000)))
  for split, p in (('train', 0.9), ('validation', 0.05), ('test', 0.05)):
    assert abs(counts[split] - 4_000 * p) < 4 * math.sqrt(4_000 * p * (1 - p))


def test_examples_do_not_depend_on_the_order_of_access():
  first, second = (star.Source(TASKS['medium'], 'train') for _ in range(2))
  forwards = [first[i]['tokens'].tolist() for i in range(40)]
  assert [second[i]['tokens'].tolist() for i in reversed(range(40))][::-1] == forwards
  assert [first[i]['tokens'].tolist() for i in range(40)] == forwards, (
    'reading an example again should give the same tokens'
  )
  assert len({tuple(tokens) for tokens in forwards}) == 40
  assert star.Source(changed('medium', seed=1), 'train')[0]['tokens'].tolist() != forwards[0]
  assert star.Source(TASKS['medium'], 'test')[0]['tokens'].tolist() != forwards[0]


def test_the_training_split_is_endless_only_if_num_train_is_zero():
  assert [len(star.Source(TASKS['tiny'], split)) for split in star.SPLITS] == [50_000, 1_000, 1_000]
  assert not star.Source(TASKS['tiny'], 'train').endless
  endless = star.Source(changed('tiny', num_train=0), 'train')
  assert endless.endless and len(endless) > 10**12
  far = [endless[2**40 + i]['tokens'].tolist() for i in range(5)]
  assert far == [endless[2**40 + i]['tokens'].tolist() for i in range(5)] and len(set(map(tuple, far))) == 5


@pytest.mark.parametrize(
  'change',
  [
    {'num_nodes': 15},
    {'num_nodes': 2 * 10**9},
    {'min_length': 1},
    {'min_length': 7},
    {'min_plan': 3},
    {'min_plan': -1},
    {'degree': 0},
  ],
)
def test_settings_that_allow_no_graph_are_refused_with_a_one_line_error(change):
  star.check_config(TASKS['medium'])
  with pytest.raises(UserError) as error:
    star.Source(changed('medium', **change), 'train')
  assert '\n' not in str(error.value) and 'task' in str(error.value)


def test_the_smallest_allowed_num_nodes_is_enough_for_every_graph():
  cfg, rng = changed('medium', num_nodes=16), np.random.default_rng(0)
  star.check_config(cfg)
  for _ in range(300):
    assert max(map(max, star.make_graph(rng, cfg).edges)) < 16


def test_a_split_that_no_graph_belongs_to_is_refused(monkeypatch):
  monkeypatch.setattr(star, 'MAX_DRAWS', 100)
  cfg = changed('tiny', degree=1, min_length=2, max_length=2, num_nodes=2)  # only two different graphs exist
  with pytest.raises(UserError, match=r'none of 100 random graphs belongs to the (validation|test|train) split'):
    for split in star.SPLITS:
      star.Source(cfg, split).graph(0)


# --- text and scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TASKS)
def test_decoding_a_prompt_and_encoding_the_text_gives_the_same_tokens(name):
  cfg = TASKS[name]
  for graph in graphs(name, 30):
    example = star.encode(graph)
    text = star.decode(example['tokens'], cfg)
    edges = '|'.join(f'{u},{v}' for u, v in graph.edges)
    assert text == f'{edges}/{graph.path[0]},{graph.path[-1]}=' + ','.join(map(str, graph.path))
    prompt = example['tokens'][example['fixed']].tolist()
    for form in (text, text.split('=')[0], f'  {text.replace(",", " , ").replace("|", " | ")}\n'):
      assert star.encode_prompt(form, cfg) == prompt


def test_an_answer_that_is_not_a_path_is_decoded_edge_by_edge():
  prompt = star.encode_prompt('1,2|2,3/1,3', TASKS['easy'])

  def text(*answer):
    return star.decode([*prompt, *(FIRST + node for node in answer)], TASKS['easy']).split('=')[1]

  assert text(1, 2, 2, 3) == '1,2,3'
  assert text(1, 2) == '1,2'
  assert text() == ''
  assert text(1, 2, 3, 4) == '1,2|3,4'
  assert text(1, 2, 2) == '1,2|2'
  assert text(5) == '5'


MALFORMED = [
  '',
  '1,2',
  '1,2/',
  '1,2/1',
  '1,2,3/1,2',
  '1 2/1,2',
  '1,2|/1,2',
  '1,2/1,2/3,4',
  '1,2//1,2',
  '/1,2',
  '1;2/1,2',
]
UNKNOWN = ['1,20/1,2', '1,x/1,2', '1,2/1,-2', '01,2/1,2', '[BOS],2/1,2', '1,/1,2']


@pytest.mark.parametrize(
  'prompts, parts', [(MALFORMED, ['u,v|u,v|.../source,goal']), (UNKNOWN, ['unknown token', '0 ... 19'])]
)
def test_a_malformed_prompt_is_refused_with_a_one_line_error(prompts, parts):
  for prompt in prompts:
    with pytest.raises(UserError) as error:
      star.encode_prompt(prompt + '\n', TASKS['easy'])
    assert '\n' not in str(error.value) and all(part in str(error.value) for part in parts), prompt


def test_the_score_measures_exact_matches_and_correct_tokens():
  reference = np.array([8, 9, 9, 10])

  def score(*predicted):
    pairs = star.score(np.array(predicted, np.int32), reference, TASKS['easy'])
    assert pairs['exact_match'][1] == 1 and pairs['token_accuracy'][1] == 4
    return pairs['exact_match'][0], pairs['token_accuracy'][0]

  assert score(8, 9, 9, 10) == (1, 4)
  assert score(8, 9, 9, 11) == (0, 3)
  assert score(8, 9, 9) == (0, 3), 'a correct prefix is not an exact match'
  assert score(8, 9, 9, 10, 10) == (0, 4), 'a correct answer with an extra token is not an exact match'
  assert score() == (0, 0)


# --- the order of the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tiny', 'hard'])
def test_the_oracle_order_reverses_the_answer_tokens_but_not_the_decoded_text(name):
  cfg, oracle = changed(name), changed(name, order='oracle')
  del cfg.order  # configs of old runs have no `order`
  for i in range(20):
    forwards, backwards = star.Source(cfg, 'test')[i], star.Source(oracle, 'test')[i]
    fixed = forwards['fixed']
    np.testing.assert_array_equal(forwards['fixed'], backwards['fixed'])
    np.testing.assert_array_equal(forwards['tokens'][fixed], backwards['tokens'][fixed])
    np.testing.assert_array_equal(forwards['tokens'][~fixed], backwards['tokens'][~fixed][::-1])
    assert star.decode(forwards['tokens'], cfg) == star.decode(backwards['tokens'], oracle)


def test_an_unknown_answer_order_is_refused():
  with pytest.raises(UserError, match=r"task.order='random': expected path, or oracle"):
    star.Source(changed('tiny', order='random'), 'test')


@pytest.mark.parametrize('order', ['path', 'oracle'])
@pytest.mark.parametrize('name', ['easy', 'hard'])
def test_the_landmark_is_the_node_after_the_junction(name, order):
  cfg = changed(name, order=order)
  source = star.Source(cfg, 'test')
  for i in range(50):
    graph, example = source.graph(i), source[i]
    junction_index = graph.path.index(junction(graph))
    answer = example['tokens'][~example['fixed']]
    found = star.landmark(example['tokens'], cfg)
    assert found == (2 * junction_index + 1 if order == 'path' else len(answer) - 2 - 2 * junction_index)
    assert answer[found] == FIRST + graph.path[junction_index + 1]
    assert answer[found - 1 if order == 'path' else found + 1] == FIRST + graph.path[junction_index]


def test_an_answer_without_the_junction_has_no_landmark():
  tokens = [CLS, *(FIRST + n for n in (0, 1, 0, 2, 0, 1)), BOS, FIRST + 3, FIRST + 4]
  assert star.landmark(np.array(tokens), TASKS['tiny']) is None
  assert star.landmark(np.array(tokens[:8]), TASKS['tiny']) is None
