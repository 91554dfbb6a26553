"""The `ilm-jax` command, with subcommands for training, evaluation, generation and tools."""

import importlib
import os
import sys
from typing import NamedTuple

from ilm_jax.console import guard, wants_help
from ilm_jax.types import UserError


class Subcommand(NamedTuple):
  """A subcommand: the module whose `main(argv)` runs it, its help line, and arguments that are always passed to it."""

  module: str
  help: str
  arguments: tuple[str, ...] = ()


SUBCOMMANDS = {
  'train': Subcommand('ilm_jax.main', 'train a model, or resume a run', ('--mode=train',)),
  'eval': Subcommand('ilm_jax.main', 'evaluate a run on the test split', ('--mode=eval',)),
  'configs': Subcommand('ilm_jax.configs.list', 'list the configs that come with the package'),
  'generate': Subcommand('ilm_jax.generate', 'complete prompts and fill gaps'),
  'stopping': Subcommand('ilm_jax.inference.stopping', 'compare stopping rules by the lengths they produce'),
  'infill-sets': Subcommand('ilm_jax.evaluation.infill_sets', 'make infill requests from a corpus'),
  'perplexity': Subcommand('ilm_jax.evaluation.generative_perplexity', 'measure generative perplexity of samples'),
  'report': Subcommand('ilm_jax.evaluation.report', 'tabulate runs, with confidence intervals'),
  'compile': Subcommand('ilm_jax.aot.compile', 'compile a config ahead of time for a TPU slice'),
  'convert': Subcommand('ilm_jax.evaluation.convert', "exchange weights with the authors' code, or compare with it"),
}

HELP = """Insertion language models in JAX.

usage: ilm-jax SUBCOMMAND [--flag=value ...]

{}

`ilm-jax SUBCOMMAND --help` lists the flags of a subcommand.
First steps: ilm-jax configs; ilm-jax train --config=star:tiny; ilm-jax generate --workdir=runs/star-tiny"""


def main(argv=None) -> int:
  """Run `ilm-jax`; return the exit code."""
  _, *arguments = sys.argv if argv is None else argv
  return guard(lambda: run(arguments))


def run(arguments: list[str]) -> int:
  """Run the subcommand that the arguments name; return the exit code."""
  name = arguments[0] if arguments else '--help'
  if name == '--version':
    from ilm_jax import __version__

    print(f'ilm_jax {__version__}')
    return 0
  if name == 'help' or (name.startswith('-') and wants_help(['ilm-jax', name])):
    print(HELP.format('\n'.join(f'  {name:<12} {command.help}' for name, command in SUBCOMMANDS.items())))
    return 0
  if name not in SUBCOMMANDS:
    raise UserError(f'ilm-jax {name}: expected one of {", ".join(SUBCOMMANDS)}; see ilm-jax --help')
  command = SUBCOMMANDS[name]
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # makes the user's modules importable; last, so that they shadow no installed ones
  sys.argv = [f'ilm-jax {name}', *arguments[1:]]  # run.json records sys.argv as the command
  return importlib.import_module(command.module).main([sys.argv[0], *arguments[1:], *command.arguments])


if __name__ == '__main__':
  sys.exit(main())
