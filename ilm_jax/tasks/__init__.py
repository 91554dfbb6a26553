"""The tasks: star graphs, zebra puzzles and text, each defined by a `contract.Task`.

Of ilm_jax, a task imports only `types`, `special_tokens`, `metrics` and `data`; it exchanges only arrays with models
and families. Read `contract.py` first, then `star.py`.

A new task is a module that ends in `TASK = Task(...)`. Give it a short name by adding it to TASKS, or set
`config.task.name` to the import path of the module (docs/extending.md).
"""

from ilm_jax.plugins import find
from ilm_jax.tasks.contract import Task

TASKS = {'star': 'ilm_jax.tasks.star', 'zebra': 'ilm_jax.tasks.zebra.task', 'text': 'ilm_jax.tasks.text.task'}


def get(name: str) -> Task:
  """Return a task by its name in TASKS, or by the import path of its module, which is imported on demand."""
  return find(name, table=TASKS, attribute='TASK', kind=Task, setting='config.task.name')
