"""The collective operations of a compiled program, and how many bytes each device sends for them."""

import math
import re
from typing import NamedTuple

from ilm_jax.aot.hlo import Instruction, Program

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Collective(NamedTuple):
  """A collective operation of a compiled program."""

  kind: str
  size: int  # bytes of the operation's result on each device
  group: int  # number of devices that take part in one operation
  times: int  # executions per run of the program
  certain: bool  # whether `times` is exact: False inside a loop of unknown length, which counts as one iteration
  where: str  # the JAX operation that was compiled to this collective (op_name in the HLO metadata)

  def traffic(self) -> float:
    """Return the bytes that each device sends for this collective per run of the program, assuming ring algorithms."""
    share = (self.group - 1) / self.group
    factors = {'all-reduce': 2 * share, 'reduce-scatter': self.group - 1, 'collective-permute': 1}
    return factors.get(self.kind, share) * self.size * self.times


def collectives(program: Program, devices: int) -> list[Collective]:
  """Return the collective operations of a program for `devices` devices, sorted by traffic, largest first.

  Operations with the same channel_id are parts of one collective, which is listed once.
  """
  found = {}
  for name, body in program.computations.items():
    times, certain = program.runs[name]
    for instruction in body.values():
      kind = instruction.opcode.removesuffix('-start')
      if kind not in KINDS or not times:
        continue
      size, group = _result_size(instruction, kind), _group_size(instruction, devices)
      if name.startswith('all-reduce-scatter'):  # TPU programs express reduce-scatter as a fusion of this name
        kind, size = 'reduce-scatter', size // group
      source = re.search(r'op_name="([^"]*)"', instruction.attributes)
      made = Collective(kind, size, group, times, certain, source[1] if source else '')
      channel = instruction.attribute('channel_id')
      key = (kind, channel) if channel else (name, instruction.name)
      if key not in found or found[key].size * found[key].times < made.size * made.times:
        found[key] = made
  return sorted(found.values(), key=lambda one: -one.traffic())


def _result_size(instruction: Instruction, kind: str) -> int:
  """Return the bytes of a collective's result, without the inputs that asynchronous operations return with it."""
  sizes = [array.size for array in instruction.arrays]
  if instruction.opcode == 'all-gather-start':  # returns the tuple (inputs, results)
    return sum(sizes[len(sizes) // 2 :])
  if instruction.opcode == 'collective-permute-start':  # returns the tuple (input, result, contexts)
    return sizes[min(1, len(sizes) - 1)]
  return sum(sizes)


def _group_size(instruction: Instruction, devices: int) -> int:
  """Return the number of devices in each replica group of a collective."""
  text = instruction.attributes
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):
    return int(match[2])
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return len(match[1].split(','))
  return 2 if 'source_target_pairs=' in text else devices
