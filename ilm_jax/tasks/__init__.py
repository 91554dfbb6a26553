"""The tasks: star graphs, zebra puzzles and text, under the contract of `contract.Task`.

A task imports `types`, `special_tokens`, `metrics` and `data`; it knows nothing of models and families, and meets them
only as arrays. Start with `contract.py`, then `star.py`.

A new task is a module that ends in `TASK = Task(...)`. It needs an entry in TASKS to be found by a short name; without
one, `config.task.name` takes the import path of the module (docs/extending.md).
"""

from ilm_jax.plugins import find
from ilm_jax.tasks.contract import Task

TASKS = {'star': 'ilm_jax.tasks.star', 'zebra': 'ilm_jax.tasks.zebra.task', 'text': 'ilm_jax.tasks.text.task'}


def get(name: str) -> Task:
  """Return a task by its name in TASKS, or by the import path of its module, which is imported on demand."""
  return find(name, table=TASKS, attribute='TASK', kind=Task, setting='config.task.name')
