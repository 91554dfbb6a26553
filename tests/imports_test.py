"""Import rules: packages import only lower layers, and light modules load neither JAX nor other heavy packages."""

import ast
import fnmatch
import importlib.util
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
STARTS_JAX = {'jax', 'flax', 'optax', 'orbax'}

# The layers of ilm_jax (top-level modules and subpackages), lowest first. A module may import only from its own layer
# and from layers earlier in this list.
LAYERS = [
  *['types', 'special_tokens', 'paths', 'console', 'metrics', 'plugins', 'configs'],
  *['distributed', 'models', 'families', 'data', 'tasks', 'runs', 'inference', 'evaluation', 'training'],
  *['main', 'aot', 'generate', 'cli', '__init__'],
]

# Stricter rules: layer or module -> the only parts of ilm_jax that it may import.
NARROW = {
  'types': [],
  'paths': ['types'],
  'special_tokens': [],
  'configs': ['configs'],
  'configs.list': ['configs', 'console'],
  'metrics': ['types'],
  'plugins': ['types'],
  'console': ['types', 'paths'],
  'distributed': ['types', 'paths', 'console', 'distributed'],
  'models': ['types', 'paths', 'distributed', 'models'],
  'families': ['types', 'special_tokens', 'plugins', 'models', 'families'],
  'data': ['types', 'special_tokens', 'paths', 'data'],
  'tasks': ['types', 'special_tokens', 'paths', 'plugins', 'metrics', 'data', 'tasks'],
  'runs': ['types', 'paths', 'metrics', 'distributed', 'runs'],
  'inference.traces': [],
  'cli': ['types', 'console', '__init__'],
}

# module -> packages that it may not import, neither directly, nor inside a function, nor through other modules
FORBIDDEN = {
  'types': STARTS_JAX,
  'data.tokenizers': STARTS_JAX,
  'families.corruption': STARTS_JAX | {'grain'},
  'tasks': STARTS_JAX,
  'tasks.*': STARTS_JAX,
  'inference.api': {'clu', 'grain', 'tensorflow', 'tensorflow_datasets'},
}

# third-party package -> the only modules of ilm_jax that may import it
ONLY_IN = {
  'flax': ['models.*'],
  'grain': ['data.pipeline'],
  'tensorflow': ['runs.logs'],
  'tensorflow_datasets': ['data.builders'],
  'torch': ['models.reference', 'evaluation.scoring_models'],
  'transformers': ['evaluation.scoring_models'],
  'mauve': ['evaluation.text_statistics'],
}

# modules whose import must not load a package in HEAVY; their functions may import one when called
LIGHT = [
  *['__init__', 'cli', 'main', 'generate', 'families', 'families.contract', 'families.corruption', 'tasks', 'tasks.*'],
  *[
    'inference.stopping',
    'evaluation.generative_perplexity',
    'evaluation.infill_sets',
    'evaluation.convert',
    'configs.list',
  ],
]
HEAVY = STARTS_JAX | {'grain', 'clu', 'tensorflow', 'tensorflow_datasets'}


def imported(source: str, module: str, known, inside_functions: bool = True) -> set[str]:
  """Return the dotted names that the source of `module` imports.

  `known` lists the modules of ilm_jax, to distinguish a module from a name defined inside a module.
  """
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
  """Return the dotted module name of a file; for a package it ends in `.__init__`, so that relative imports resolve."""
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


FILES = {dotted(path): path for path in sorted(ROOT.glob('ilm_jax/**/*.py'))}
KNOWN = {name.removesuffix('.__init__') for name in FILES}
CONFIGS = sorted(path for path in (ROOT / 'ilm_jax' / 'configs').glob('*.py') if path.stem != 'list')


def short(name: str) -> str:
  """Return a module's name as the rule tables write it: without `ilm_jax.` and `.__init__`."""
  return name.removesuffix('.__init__').removeprefix('ilm_jax.') if name != 'ilm_jax.__init__' else '__init__'


def row(table: dict, name: str):
  """Return the entry of a rule table for a module, by exact name or else by first matching pattern, or None."""
  return table.get(name, next((table[key] for key in table if fnmatch.fnmatch(name, key)), None))


def imports_of(name: str, inside_functions: bool = True) -> set[str]:
  """Return the dotted names that a module of ilm_jax imports."""
  return imported(FILES[name].read_text(), name, KNOWN, inside_functions)


def loads(name: str, inside_functions: bool = True) -> set[str]:
  """Return the packages that a module imports, directly or through other modules of ilm_jax."""
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


def layer(name: str) -> str:
  """Return the layer of a module, such as `families` for `families.ilm`."""
  return name.split('.')[0]


def narrow(name: str):
  """Return the list of imports that NARROW allows for a module, or None if NARROW has no rule for it."""
  return NARROW.get(name, NARROW.get(layer(name)))


def test_a_module_imports_only_its_own_layer_and_lower_ones():
  for module in FILES:
    name = short(module)
    found = {short(n) for n in imports_of(module) if n.split('.')[0] == 'ilm_jax'} - {'ilm_jax'}
    lower = LAYERS[: LAYERS.index(layer(name)) + 1]
    odd = {other for other in found if layer(other) not in lower}
    assert not odd, f'{module} imports {sorted(odd)}, which are not below {layer(name)}'
    if (allowed := narrow(name)) is not None:
      odd = {other for other in found if other not in allowed and layer(other) not in allowed}
      assert not odd, f'{module} imports {sorted(odd)}: allowed are {allowed}'


def test_every_package_documents_its_purpose_its_imports_and_where_to_start_reading():
  for name, path in FILES.items():
    if name.endswith('.__init__') and name.count('.') == 2:
      text = ' '.join(ast.get_docstring(ast.parse(path.read_text())).lower().split())
      assert re.search('start with|read .* first', text) and 'import' in text, (
        f'{name}: say what it may import, and where to start reading'
      )


def test_no_module_imports_its_forbidden_packages():
  for module in FILES:
    odd = loads(module) & (row(FORBIDDEN, short(module)) or set())
    assert not odd, f'{module} imports {sorted(odd)}, directly or through other modules'


def test_a_third_party_package_is_imported_only_by_its_listed_modules():
  for module in FILES:
    packages = {name.split('.')[0] for name in imports_of(module)}
    odd = {
      package
      for package in packages & set(ONLY_IN)
      if not any(fnmatch.fnmatch(short(module), p) for p in ONLY_IN[package])
    }
    assert not odd, f'{module} imports {sorted(odd)}, which belong to {[ONLY_IN[package] for package in sorted(odd)]}'


def test_importing_a_light_module_loads_no_heavy_package():
  for module in FILES:
    if any(fnmatch.fnmatch(short(module), pattern) for pattern in LIGHT):
      odd = loads(module, inside_functions=False) & HEAVY
      assert not odd, f'{module} loads {sorted(odd)} when it is imported: import them inside the function'


def test_a_config_imports_only_ml_collections():
  for path in CONFIGS:
    packages = {name.split('.')[0] for name in imported(path.read_text(), dotted(path), known=())}
    assert packages - sys.stdlib_module_names <= {'ml_collections', 'ilm_jax'}


def test_every_form_of_import_statement_is_recognized():
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
  """Run code in a new Python interpreter; return its standard output."""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_importing_ilm_jax_loads_neither_numpy_nor_a_heavy_package():
  assert run(f'import sys, ilm_jax; print(*({HEAVY | {"numpy"}} & set(sys.modules)))') == ''


def test_importing_the_data_pipeline_starts_no_jax_backend():
  started = (
    'import sys, ilm_jax.data.pipeline\n'
    'bridge = sys.modules.get("jax._src.xla_bridge")  # grain imports jax by itself\n'
    'print(*(bridge._backends if bridge else ()))\n'
  )
  assert run(started) == ''
  assert run('import jax; jax.devices()\n' + started) != '', 'update this test to the JAX version'
