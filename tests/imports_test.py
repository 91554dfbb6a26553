"""Who may import whom: downwards only, and never what would make a light module heavy."""

import ast
import fnmatch
import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STARTS_JAX = {'jax', 'flax', 'optax', 'orbax'}

# module -> the modules of ilm_jax it may import; a row names only rows above it. The first row that fits counts.
ALLOWED = {
  'types': [],
  'sharding': ['types'],
  'ops': ['types', 'sharding'],
  'tokenizer': ['types'],
  'console': ['types'],
  'hosts': ['types', 'console'],
  'model': ['types', 'ops', 'sharding'],
  'families': ['types'],
  'families.corrupt': ['types', 'tokenizer'],
  'families.settings': ['types'],
  'families.growing': ['types'],
  'families.likelihood': ['types', 'ops'],
  'families.arm': ['types', 'ops', 'tokenizer', 'families.corrupt', 'families.settings', 'families.growing'],
  'families.*': [
    *['types', 'ops', 'tokenizer', 'families.corrupt', 'families.settings', 'families.likelihood', 'families.growing'],
    'families.arm',
  ],
  'tasks': ['types'],
  'tasks.pipeline': ['types', 'tokenizer', 'families', 'families.corrupt'],
  'tasks.storage': ['types'],
  'tasks.corpora': ['types', 'tasks.storage'],
  'tasks.builders': ['types', 'tasks.storage'],
  'tasks.zebra_puzzles': ['types'],
  'tasks.zebra_released': ['types', 'tasks.zebra_puzzles'],
  'tasks.zebra': ['types', 'tokenizer', 'tasks.builders', 'tasks.zebra_puzzles', 'tasks.zebra_released'],
  'tasks.text': ['types', 'tokenizer', 'tasks.builders', 'tasks.corpora', 'tasks.storage'],
  'tasks.*': ['types', 'tokenizer'],
  'optimizer': ['types'],
  'metrics': ['types'],
  'dashboards': ['types', 'metrics'],
  'checkpoint': ['types', 'sharding', 'hosts', 'model', 'optimizer', 'dashboards'],
  'sampling': ['types', 'sharding', 'model'],
  'batching': ['types', 'sharding', 'model', 'sampling', 'families.growing'],
  'evaluate': ['types', 'tokenizer', 'sharding', 'model', 'sampling', 'tasks.pipeline', 'metrics'],
  'infilling': ['types', 'tokenizer'],
  'traces': [],
  'api': [
    'types',
    'tokenizer',
    'sharding',
    'model',
    'sampling',
    'batching',
    'infilling',
    'traces',
    'families',
    'families.growing',
    'families.settings',
    'tasks',
    'checkpoint',
  ],
  'judges': ['types', 'tokenizer', 'model', 'families.arm', 'checkpoint', 'api'],
  'quality': ['metrics', 'judges'],
  'experiment': [
    'types',
    'tokenizer',
    'families',
    'model',
    'optimizer',
    'sharding',
    'tasks',
    'tasks.pipeline',
    'judges',
  ],
  'update': ['types', 'model', 'optimizer', 'sharding', 'experiment'],
  'workdir': ['types', 'hosts', 'dashboards', 'experiment'],
  'train': [
    *[
      'types',
      'model',
      'sharding',
      'families.settings',
      'tasks.pipeline',
      'optimizer',
      'metrics',
      'dashboards',
      'checkpoint',
      'evaluate',
    ],
    *['hosts', 'judges', 'quality', 'experiment', 'update', 'workdir'],
  ],
  'main': ['types', 'console', 'hosts', 'train'],
  'hlo': [],
  'compile_only': [
    *['types', 'console', 'sharding', 'model', 'tasks', 'tasks.pipeline', 'optimizer', 'batching', 'families.growing'],
    *['experiment', 'update', 'main', 'hlo'],
  ],
  'generate': ['types', 'console', 'tasks.corpora', 'hosts', 'dashboards', 'checkpoint', 'api'],
  'stopping': ['types', 'console', 'api', 'batching', 'sampling'],
  'judge': ['types', 'console', 'tasks.corpora', 'judges', 'quality'],
  'infill_sets': ['types', 'console', 'tasks.corpora', 'tasks.text', 'checkpoint'],
  'report': ['types', 'console', 'dashboards', 'metrics'],
  'convert': ['types', 'model', 'checkpoint', 'api'],
  '__init__': ['api'],
}

# module -> the packages that neither it nor anything it loads may import, not even inside a function
FORBIDDEN = {
  'types': STARTS_JAX,
  'tokenizer': STARTS_JAX,
  'families.corrupt': STARTS_JAX | {'grain'},
  'tasks': STARTS_JAX,
  'tasks.*': STARTS_JAX,
  'api': {'clu', 'grain', 'tensorflow', 'tensorflow_datasets'},
}

# package -> the only modules that may import it
ONLY_IN = {
  'flax': ['model'],
  'grain': ['tasks.pipeline'],
  'tensorflow': ['dashboards'],
  'tensorflow_datasets': ['tasks.builders'],
  'torch': ['convert', 'judges'],
  'transformers': ['judges'],
  'mauve': ['quality'],
}

# modules that must not have loaded these packages once they are imported; their functions may
LIGHT = [
  *['__init__', 'families', 'families.corrupt', 'tasks', 'main', 'generate', 'stopping', 'judge', 'infill_sets'],
]
HEAVY = STARTS_JAX | {'grain', 'clu', 'tensorflow', 'tensorflow_datasets'}


def imported(source: str, module: str, known, inside_functions: bool = True) -> set[str]:
  """The dotted names that the source of `module` imports; `known` tells modules from what is in them."""
  found = set()
  nodes = [ast.parse(source)]
  while nodes:
    node = nodes.pop()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
      continue
    if isinstance(node, ast.Import):
      found |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = importlib.util.resolve_name('.' * node.level + (node.module or ''), module.rpartition('.')[0])
      found |= {f'{base}.{name.name}' if f'{base}.{name.name}' in known else base for name in node.names}
    nodes += ast.iter_child_nodes(node)
  return found


def dotted(path: pathlib.Path) -> str:
  """The module of a file; a package ends in `.__init__`, so that relative imports resolve."""
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


FILES = {dotted(path): path for path in sorted(ROOT.glob('ilm_jax/**/*.py'))}
KNOWN = {name.removesuffix('.__init__') for name in FILES}
CONFIGS = sorted(ROOT.glob('configs/**/*.py'))


def short(name: str) -> str:
  """The name of a module in the tables."""
  return name.removesuffix('.__init__').removeprefix('ilm_jax.') if name != 'ilm_jax.__init__' else '__init__'


def row(table: dict, name: str):
  """The first row of a table that fits a module, or None; a name goes before a pattern."""
  return table.get(name, next((table[key] for key in table if fnmatch.fnmatch(name, key)), None))


def imports_of(name: str, inside_functions: bool = True) -> set[str]:
  """The dotted names that a module of ilm_jax imports."""
  return imported(FILES[name].read_text(), name, KNOWN, inside_functions)


def loads(name: str, inside_functions: bool = True) -> set[str]:
  """The packages that a module imports, itself or through the modules of ilm_jax that load with it."""
  wanted, seen = imports_of(name, inside_functions) | {name.rpartition('.')[0]}, set()
  while wanted:
    target = wanted.pop()
    if target in seen:
      continue
    seen.add(target)
    if target.split('.')[0] == 'ilm_jax':
      parent = target.rpartition('.')[0]
      wanted |= {parent} if parent else set()
      file = target if target in FILES else f'{target}.__init__'
      wanted |= imports_of(file, inside_functions=False) if file in FILES else set()
  return {target.split('.')[0] for target in seen}


@pytest.fixture(params=FILES, ids=short)
def module(request):
  return request.param


def test_a_module_imports_only_what_lies_below_it(module):
  allowed = row(ALLOWED, short(module))
  assert allowed is not None, f'{module} has no row in ALLOWED: say what it may import'
  ours = {short(name) if name != 'ilm_jax' else name for name in imports_of(module) if name.split('.')[0] == 'ilm_jax'}
  assert ours <= set(allowed), f'{module} imports {sorted(ours - set(allowed))}: allowed are {sorted(allowed)}'


def test_the_table_points_downwards():
  above = []
  for name, allowed in ALLOWED.items():
    assert set(allowed) <= set(above), f'{name} may not import {sorted(set(allowed) - set(above))}, which lie above it'
    above.append(name)


def test_a_module_avoids_its_forbidden_packages(module):
  odd = loads(module) & (row(FORBIDDEN, short(module)) or set())
  assert not odd, f'{module} imports {sorted(odd)}, itself or through what it loads'


def test_a_package_stays_inside_its_modules(module):
  packages = {name.split('.')[0] for name in imports_of(module)}
  odd = {package for package in packages & set(ONLY_IN) if short(module) not in ONLY_IN[package]}
  assert not odd, f'{module} imports {sorted(odd)}, which belong to {[ONLY_IN[package] for package in sorted(odd)]}'


def test_a_light_module_loads_nothing_heavy(module):
  if short(module) in LIGHT:
    odd = loads(module, inside_functions=False) & HEAVY
    assert not odd, f'{module} loads {sorted(odd)} when it is imported: import them inside the function'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.name)
def test_a_config_imports_only_ml_collections(path):
  packages = {name.split('.')[0] for name in imported(path.read_text(), dotted(path), known=())}
  assert packages - sys.stdlib_module_names <= {'ml_collections', 'configs'}


def test_every_form_of_import_is_read():
  source = (
    'import os.path, jax.numpy as jnp\n'
    'from ilm_jax import ops, load\n'
    'from ilm_jax.types import Batch\n'
    'from . import corrupt\n'
    'from ..tasks.star import draw\n'
    'if True:\n  import flax\n'
    'class C:\n  import numpy\n'
    'def f():\n  from grain import python\n'
  )
  known = {'ilm_jax', 'ilm_jax.ops', 'ilm_jax.types', 'ilm_jax.families.corrupt', 'ilm_jax.tasks.star'}
  at_import = {'os.path', 'jax.numpy', 'flax', 'numpy'} | known
  assert imported(source, 'ilm_jax.families.ilm', known, inside_functions=False) == at_import
  assert imported(source, 'ilm_jax.families.ilm', known) == at_import | {'grain'}


def run(code: str) -> str:
  """What a fresh interpreter prints."""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
  assert run(f'import sys, ilm_jax; print(*({HEAVY | {"numpy"}} & set(sys.modules)))') == ''


def test_importing_the_pipeline_starts_no_backend():
  started = (
    'import sys, ilm_jax.tasks.pipeline\n'
    'bridge = sys.modules.get("jax._src.xla_bridge")  # grain imports jax by itself\n'
    'print(*(bridge._backends if bridge else ()))\n'
  )
  assert run(started) == ''
  assert run('import jax; jax.devices()\n' + started) != '', 'jax keeps its backends elsewhere now: look there'
