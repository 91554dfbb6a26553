"""Star graphs: every property of a graph from its edges alone, by search; and the text form."""

import collections
import itertools
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.tasks import star
from ilm_jax.types import UserError

CLS, BOS, FIRST = 1, 4, 7


def task(degree, min_length, max_length, min_plan, num_nodes):
  return ConfigDict({
    'degree': degree, 'min_length': min_length, 'max_length': max_length, 'min_plan': min_plan, 'num_nodes': num_nodes,
    'seed': 0, 'num_train': 3_000, 'num_validation': 300, 'num_test': 300,
  })  # fmt: skip


TASKS = {
  'tiny': task(2, 4, 4, 0, 10),
  'easy': task(3, 5, 5, 0, 20),
  'medium': task(3, 3, 6, 2, 20),
  'hard': task(5, 6, 12, 5, 56),
}
# Tokens of the prompt (edges, source and goal) and of the answer, from the specification.
LENGTHS = {
  'tiny': ((14, 14), (6, 6)),
  'easy': ((26, 26), (8, 8)),
  'medium': ((14, 32), (4, 10)),
  'hard': ((52, 112), (10, 22)),
}


def graphs(cfg, number):
  rng = np.random.default_rng(0)
  return [star.make_graph(rng, cfg) for _ in range(number)]


def all_paths(edges, start, goal):
  """Every path without a repeated node, by depth-first search."""
  after = collections.defaultdict(list)
  for u, v in edges:
    after[u].append(v)
  found, stack = [], [[start]]
  while stack:
    path = stack.pop()
    if path[-1] == goal:
      found.append(path)
    stack += [[*path, node] for node in after[path[-1]] if node not in path]
  return found


def junction(graph):
  """The node that all arms share: with three arms or more, the only one with three edges or more."""
  edges = collections.Counter(node for edge in graph.edges for node in edge)
  (found,) = [node for node, number in edges.items() if number > 2]
  return found


@pytest.mark.parametrize('name', TASKS)
def test_the_path_is_the_only_one_from_source_to_goal(name):
  for graph in graphs(TASKS[name], 200):
    assert all_paths(graph.edges, graph.path[0], graph.path[-1]) == [graph.path]


@pytest.mark.parametrize('name', TASKS)
def test_the_edges_form_a_tree_of_distinct_names(name):
  cfg = TASKS[name]
  for graph in graphs(cfg, 200):
    nodes = {node for edge in graph.edges for node in edge}
    assert nodes <= set(range(cfg.num_nodes))
    assert len(set(graph.edges)) == len(graph.edges) == len(nodes) - 1
    group = {min(nodes)}
    for _ in nodes:  # everything is connected
      group |= {node for edge in graph.edges if set(edge) & group for node in edge}
    assert group == nodes


@pytest.mark.parametrize('name', TASKS)
def test_an_example_lists_edges_and_ends_then_the_edges_of_the_path(name):
  cfg = TASKS[name]
  (prompt_from, prompt_to), (answer_from, answer_to) = LENGTHS[name]
  seen = set()
  for graph in graphs(cfg, 500):
    example = star.encode(graph)
    tokens, fixed = example['tokens'].tolist(), example['fixed'].tolist()
    assert example['tokens'].dtype == np.int32 and example['fixed'].dtype == bool
    bos = tokens.index(BOS)
    prompt, answer = tokens[1:bos], tokens[bos + 1 :]
    assert tokens[0] == CLS and fixed == [True] * (bos + 1) + [False] * len(answer)
    numbers = [token - FIRST for token in prompt]
    assert list(zip(numbers[:-2:2], numbers[1:-2:2], strict=True)) == graph.edges
    assert numbers[-2:] == [graph.path[0], graph.path[-1]]
    steps = [(answer[i] - FIRST, answer[i + 1] - FIRST) for i in range(0, len(answer), 2)]
    assert steps == [(graph.path[i], graph.path[i + 1]) for i in range(len(graph.path) - 1)]
    assert prompt_from <= len(prompt) <= prompt_to and answer_from <= len(answer) <= answer_to
    assert len(tokens) <= star.longest(cfg)
    assert min(prompt + answer) >= FIRST and max(prompt + answer) < star.tokenizer(cfg).vocab_size
    seen.add(len(answer))
  assert seen == set(range(answer_from, answer_to + 1, 2)), 'every length of a path occurs'


def test_the_longest_example_is_as_long_as_said():
  for name, cfg in TASKS.items():
    assert star.longest(cfg) == LENGTHS[name][0][1] + LENGTHS[name][1][1] + 2  # [CLS] and [BOS]


def test_vocabularies_are_the_specials_and_the_nodes():
  assert [star.tokenizer(TASKS[name]).vocab_size for name in ('easy', 'medium', 'hard')] == [27, 27, 63]


def test_in_a_symmetric_graph_all_arms_start_in_the_source():
  for graph in graphs(TASKS['easy'], 200):
    assert junction(graph) == graph.path[0]
    starts = collections.Counter(u for u, _ in graph.edges)
    assert starts[graph.path[0]] == 3 and len(graph.path) == 5
    goals = {v for _, v in graph.edges} - set(starts)
    assert len(goals) == 3 and graph.path[-1] in goals
    assert all(len(all_paths(graph.edges, graph.path[0], goal)[0]) == 5 for goal in goals)


def spread(seen, expected):
  """Pearson's statistic minus its mean, in units of its standard deviation."""
  number = sum(seen.values())
  assert set(seen) <= set(expected)
  statistic = sum((seen[key] - number * p) ** 2 / (number * p) for key, p in expected.items())
  return (statistic - len(expected) + 1) / math.sqrt(2 * (len(expected) - 1))


@pytest.mark.parametrize('name', ['medium', 'hard'])
def test_the_junction_is_uniform_among_nodes_that_leave_room_for_the_plan(name):
  cfg = TASKS[name]
  seen = collections.Counter((len(g.path), g.path.index(junction(g))) for g in graphs(cfg, 6_000))
  lengths = range(cfg.min_length, cfg.max_length + 1)
  expected = {(n, j): 1 / len(lengths) / (n - cfg.min_plan) for n in lengths for j in range(n - cfg.min_plan)}
  assert abs(spread(seen, expected)) < 4


@pytest.mark.parametrize('name', ['medium', 'hard'])
def test_every_arm_has_a_length_and_a_junction_of_its_own(name):
  """Numbers of edges, and of arms that enter the junction, follow from independent arms."""
  cfg = TASKS[name]
  lengths = range(cfg.min_length, cfg.max_length + 1)
  sizes = collections.Counter({0: 1.0})
  for _ in range(cfg.degree):
    longer = collections.Counter()
    for size, p in sizes.items():
      for n in lengths:
        longer[size + n - 1] += p / len(lengths)
    sizes = longer
  drawn = graphs(cfg, 6_000)
  seen = collections.Counter(len(graph.edges) for graph in drawn)
  rare = min(size for size, p in sizes.items() if p > 1e-3)  # merge the tails
  fold = lambda size: min(max(size, rare), min(sizes) + max(sizes) - rare)  # noqa: E731
  folded, folded_seen = collections.Counter(), collections.Counter()
  for size, p in sizes.items():
    folded[fold(size)] += p
    folded_seen[fold(size)] += seen[size]
  assert abs(spread(folded_seen, folded)) < 4

  starts = np.mean([1 / (n - cfg.min_plan) for n in lengths])  # an arm begins in the junction
  binomial = {
    k: math.comb(cfg.degree, k) * (1 - starts) ** k * starts ** (cfg.degree - k) for k in range(cfg.degree + 1)
  }
  entering = collections.Counter(
    sum(v == j for _, v in g.edges) for g, j in zip(drawn, map(junction, drawn), strict=True)
  )
  assert abs(spread(entering, binomial)) < 4


def test_names_and_the_order_of_the_edges_are_shuffled():
  drawn = graphs(TASKS['easy'], 4_000)
  sources = collections.Counter(graph.path[0] for graph in drawn)
  assert abs(spread(sources, dict.fromkeys(range(20), 1 / 20))) < 4
  place = collections.Counter(g.edges.index((g.path[0], g.path[1])) for g in drawn)
  assert abs(spread(place, dict.fromkeys(range(12), 1 / 12))) < 4


# --- the source -------------------------------------------------------------------------------------------------------


def identity(graph):
  return frozenset(graph.edges), graph.path[0], graph.path[-1]


def test_the_splits_share_no_graph():
  """Of 120 graphs altogether, thousands are drawn: without the rule every split would hold them all."""
  cfg = task(2, 3, 3, 0, 5)
  found = {}
  for split in star.SPLITS:
    source = star.Source(cfg, split)
    found[split] = {identity(source.graph(i)) for i in range(len(source))}
  assert sum(map(len, found.values())) == len(set().union(*found.values())) == 120
  assert all(found.values())


def test_the_split_of_a_graph_does_not_depend_on_the_order_of_its_edges():
  splits = set()
  for graph in graphs(TASKS['medium'], 60):
    turned = [star.Graph(list(edges), graph.path) for edges in itertools.islice(itertools.permutations(graph.edges), 9)]
    turned.append(star.Graph(graph.edges[::-1], graph.path))
    assert len({star.split_of(g) for g in turned}) == 1
    splits.add(star.split_of(graph))
  assert splits == set(star.SPLITS)


def test_one_graph_in_ten_is_held_out():
  number = collections.Counter(map(star.split_of, graphs(TASKS['hard'], 4_000)))
  for split, p in (('train', 0.9), ('validation', 0.05), ('test', 0.05)):
    assert abs(number[split] - 4_000 * p) < 4 * math.sqrt(4_000 * p * (1 - p))


def test_access_is_random_and_repeatable():
  first, second = (star.Source(TASKS['medium'], 'train') for _ in range(2))
  forwards = [first[i]['tokens'].tolist() for i in range(40)]
  assert [second[i]['tokens'].tolist() for i in reversed(range(40))][::-1] == forwards
  assert [first[i]['tokens'].tolist() for i in range(40)] == forwards, 'kept ones are the same'
  assert len({tuple(tokens) for tokens in forwards}) == 40
  other_seed = ConfigDict({**TASKS['medium'], 'seed': 1})
  assert star.Source(other_seed, 'train')[0]['tokens'].tolist() != forwards[0]
  assert star.Source(TASKS['medium'], 'test')[0]['tokens'].tolist() != forwards[0]


def test_sizes_and_endless_training_data():
  assert [len(star.Source(TASKS['tiny'], split)) for split in star.SPLITS] == [3_000, 300, 300]
  assert not star.Source(TASKS['tiny'], 'train').endless
  endless = star.Source(ConfigDict({**TASKS['tiny'], 'num_train': 0}), 'train')
  assert endless.endless and len(endless) > 10**12
  far = [endless[2**40 + i]['tokens'].tolist() for i in range(5)]
  assert far == [endless[2**40 + i]['tokens'].tolist() for i in range(5)] and len(set(map(tuple, far))) == 5


@pytest.mark.parametrize(
  'change',
  [{'num_nodes': 15}, {'min_length': 1}, {'min_length': 7}, {'min_plan': 3}, {'min_plan': -1}, {'degree': 0}],
)
def test_impossible_graphs_are_refused_in_one_line(change):
  star.check(TASKS['medium'])
  with pytest.raises(UserError) as error:
    star.Source(ConfigDict({**TASKS['medium'], **change}), 'train')
  assert '\n' not in str(error.value) and 'task' in str(error.value)


def test_the_fewest_names_that_suffice_are_enough():
  for graph in graphs(ConfigDict({**TASKS['medium'], 'num_nodes': 16}), 300):
    assert max(map(max, graph.edges)) < 16


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TASKS)
def test_a_prompt_survives_the_way_to_text_and_back(name):
  cfg = TASKS[name]
  for graph in graphs(cfg, 30):
    example = star.encode(graph)
    text = star.decode(example['tokens'], cfg)
    edges = '|'.join(f'{u},{v}' for u, v in graph.edges)
    assert text == f'{edges}/{graph.path[0]},{graph.path[-1]}=' + ','.join(map(str, graph.path))
    prompt = example['tokens'][example['fixed']].tolist()
    for form in (text, text.split('=')[0], f'  {text.replace(",", " , ").replace("|", " | ")}\n'):
      assert star.encode_prompt(form, cfg) == prompt


def test_an_answer_that_is_no_chain_is_written_edge_by_edge():
  prompt = star.encode_prompt('1,2|2,3/1,3', TASKS['easy'])

  def text(*answer):
    return star.decode([*prompt, *(FIRST + node for node in answer)], TASKS['easy']).split('=')[1]

  assert text(1, 2, 2, 3) == '1,2,3'
  assert text(1, 2) == '1,2'
  assert text() == ''
  assert text(1, 2, 3, 4) == '1,2|3,4'
  assert text(1, 2, 2) == '1,2|2'
  assert text(5) == '5'


@pytest.mark.parametrize(
  'prompt',
  ['', '1,2', '1,2/', '1,2/1', '1,2,3/1,2', '1 2/1,2', '1,2|/1,2', '1,2/1,2/3,4', '1,2//1,2', '/1,2', '1;2/1,2'],
)
def test_a_malformed_prompt_is_refused_in_one_line(prompt):
  with pytest.raises(UserError) as error:
    star.encode_prompt(prompt + '\n', TASKS['easy'])
  assert '\n' not in str(error.value) and 'u,v|u,v|.../source,goal' in str(error.value)


@pytest.mark.parametrize('prompt', ['1,20/1,2', '1,x/1,2', '1,2/1,-2', '01,2/1,2', '[BOS],2/1,2', '1,/1,2'])
def test_an_unknown_node_is_refused_in_one_line(prompt):
  with pytest.raises(UserError) as error:
    star.encode_prompt(prompt, TASKS['easy'])
  assert '\n' not in str(error.value) and 'unknown token' in str(error.value) and '0 ... 19' in str(error.value)


def test_the_score_counts_exact_answers_and_right_places():
  reference = np.array([8, 9, 9, 10])

  def score(*predicted):
    pairs = star.score(np.array(predicted, np.int32), reference, TASKS['easy'])
    assert pairs['exact_match'][1] == 1 and pairs['token_accuracy'][1] == 4
    return pairs['exact_match'][0], pairs['token_accuracy'][0]

  assert score(8, 9, 9, 10) == (1, 4)
  assert score(8, 9, 9, 11) == (0, 3)
  assert score(8, 9, 9) == (0, 3), 'a correct beginning is no answer'
  assert score(8, 9, 9, 10, 10) == (0, 4), 'nor is a correct one with something behind it'
  assert score() == (0, 0)


# --- the order of the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TASKS)
def test_the_oracle_order_is_the_answer_backwards_and_reads_the_same(name):
  cfg = TASKS[name]
  oracle = ConfigDict({**cfg.to_dict(), 'order': 'oracle'})
  for i in range(20):
    forwards, backwards = star.Source(cfg, 'test')[i], star.Source(oracle, 'test')[i]
    fixed = forwards['fixed']
    np.testing.assert_array_equal(forwards['fixed'], backwards['fixed'])
    np.testing.assert_array_equal(forwards['tokens'][fixed], backwards['tokens'][fixed])
    np.testing.assert_array_equal(forwards['tokens'][~fixed], backwards['tokens'][~fixed][::-1])
    assert star.decode(forwards['tokens'], cfg) == star.decode(backwards['tokens'], oracle)


def test_an_unknown_order_is_refused():
  with pytest.raises(UserError, match=r"task.order='random': expected path, or oracle"):
    star.Source(ConfigDict({**TASKS['tiny'].to_dict(), 'order': 'random'}), 'test')


@pytest.mark.parametrize('order', ['path', 'oracle'])
@pytest.mark.parametrize('name', ['easy', 'medium', 'hard'])
def test_the_landmark_is_the_node_behind_the_junction(name, order):
  cfg = ConfigDict({**TASKS[name].to_dict(), 'order': order})
  source = star.Source(cfg, 'test')
  for i in range(50):
    graph, tokens = source.graph(i), source[i]['tokens']
    at = graph.path.index(junction(graph))
    answer = tokens[~source[i]['fixed']]
    found = star.landmark(tokens, cfg)
    if order == 'path':
      assert found == 2 * at + 1
    else:
      assert found == len(answer) - 2 - 2 * at
    assert answer[found] == FIRST + graph.path[at + 1]
    assert answer[found - 1 if order == 'path' else found + 1] == FIRST + graph.path[at]


def test_an_answer_without_the_junction_has_no_landmark():
  tokens = [CLS, *(FIRST + n for n in (0, 1, 0, 2, 0, 1)), BOS, FIRST + 3, FIRST + 4]
  assert star.landmark(np.array(tokens), TASKS['tiny']) is None
  assert star.landmark(np.array(tokens[:8]), TASKS['tiny']) is None


def test_a_split_without_graphs_is_said():
  cfg = ConfigDict({**task(1, 2, 2, 0, 2).to_dict()})
  with pytest.raises(UserError, match=r'none of the (validation|test|train) split'):
    for split in ('train', 'validation', 'test'):
      star.Source(cfg, split).graph(0)


@pytest.mark.parametrize('name', ['tiny', 'mini', 'easy', 'medium', 'hard'])
def test_configs_agree_with_the_task_on_lengths(name):
  from ilm_jax.configs import star as config

  cfg = config.get_config(name)
  assert cfg.sampling.max_length == star.longest(cfg.task)
  assert star.longest_answer(cfg.task) == max(LENGTHS.get(name, LENGTHS['tiny'])[1])
  assert star.chance(cfg.task) == 1 / cfg.task.degree
