"""Parse the text of a compiled program (HLO): its computations, their instructions, and how often each one runs."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}  # fmt: skip
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\](\{[^{}]*\})?')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}'
)


class Array(NamedTuple):
  """An array in the result of an HLO instruction."""

  size: int  # size of the array in bytes
  in_memory: bool  # whether it is in HBM; False if its layout, S(1), places it in on-chip memory


class Instruction(NamedTuple):
  """An instruction of an HLO computation."""

  name: str
  opcode: str
  arrays: list[Array]  # arrays of the result, which may be a tuple
  operands: list[str]  # names of the operands
  attributes: str  # the text that follows the operands, such as `dimensions={0}`
  root: bool

  def size(self) -> int:
    """Return the size of the result in bytes."""
    return sum(array.size for array in self.arrays)

  def size_in_memory(self) -> int:
    """Return the bytes of the result that are in device memory (HBM), not in on-chip memory."""
    return sum(array.size for array in self.arrays if array.in_memory)

  def attribute(self, name: str) -> str:
    """Return the value of an attribute, such as the name of a called computation; '' if it is absent."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else ''


class Program(NamedTuple):
  """A parsed HLO program."""

  computations: dict[str, dict[str, Instruction]]  # computation name -> {instruction name: instruction}
  runs: dict[str, tuple[int, bool]]  # computation name -> (executions per run of the program, whether exact)


def parse(text: str) -> Program:
  """Parse the text of a compiled program. Loops of unknown length count as one iteration."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (instruction := _instruction(line)):
      current[instruction.name] = instruction
  return Program(computations, _count_runs(computations, entry))


def _instruction(line: str) -> Instruction | None:
  """Parse a line of a computation; return None if it is not an instruction."""
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  root, name, shape, opcode, rest = found.groups()
  depth, end = 1, len(rest)
  for index, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if not depth:
      end = index
      break
  operands = re.sub(r'/\*.*?\*/', '', rest[:end])
  names = [part.split()[-1].lstrip('%') for part in operands.split(',') if part.strip()]
  return Instruction(name, opcode, _arrays(shape), names, rest[end + 1 :], bool(root))


def _arrays(shape: str) -> list[Array]:
  """Return the arrays of a shape in HLO notation, such as `(f32[8,16]{1,0}, s32[])`."""
  return [
    Array(int(math.prod(map(int, filter(None, dims.split(',')))) * BYTES[dtype]), 'S(' not in layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
    if dtype in BYTES
  ]


def _count_runs(computations: dict, entry: str) -> dict[str, tuple[int, bool]]:
  """Return how often each computation executes per run of the program, and whether that number is exact."""
  calls = defaultdict(list)
  for name, body in computations.items():
    for instruction in body.values():
      trips = _trip_count(computations, body, instruction) if instruction.opcode == 'while' else 1
      for one, several in _CALLED.findall(instruction.attributes):
        for called in [one] if one else re.findall(r'%?([\w.\-]+)', several):
          calls[name].append((called, trips or 1, trips is not None))
  runs = defaultdict(lambda: (0, True))

  def visit(name, times, certain):
    if name not in computations:
      return
    before = runs[name]
    runs[name] = before[0] + times, before[1] and certain
    for called, more, sure in calls[name]:
      visit(called, times * more, certain and sure)

  visit(entry, 1, True)
  return runs


def _trip_count(computations: dict, outer: dict, loop: Instruction) -> int | None:
  """Return the number of iterations of a while loop; None if it is unknown.

  XLA annotates some loops with this number. For other loops it is derived from a counter that starts at 0, grows by a
  constant and is compared with a constant.
  """
  if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return int(noted[1])
  try:
    condition, body = (computations[loop.attribute(name)] for name in ('condition', 'body'))
    begin, less, result = outer[loop.operands[0]], root_of(condition), root_of(body)
    counter, limit = condition[less.operands[0]], _constant(condition, less.operands[1])
    index = int(counter.attribute('index'))
    addition = body[result.operands[index]]
    before, step = _original(body, addition.operands[0]), _constant(body, addition.operands[1])
    start = _constant(outer, begin.operands[index])
  except (IndexError, KeyError, ValueError):
    return None
  opcodes = [one.opcode for one in (begin, result, less, addition, counter, before)]
  if opcodes != ['tuple', 'tuple', 'compare', 'add', 'get-tuple-element', 'get-tuple-element']:
    return None
  counts_up = 'direction=LT' in less.attributes and before.attribute('index') == str(index) and start == 0
  return -(-limit // step) if counts_up and step else None


def root_of(body: dict) -> Instruction:
  """Return the root instruction of a computation: its result is the result of the computation."""
  return next(instruction for instruction in body.values() if instruction.root)


def _original(body: dict, name: str) -> Instruction:
  """Return the instruction with this name or, if that is a copy, the instruction that was copied."""
  instruction = body[name]
  while instruction.opcode == 'copy':
    instruction = body[instruction.operands[0]]
  return instruction


def _constant(body: dict, name: str) -> int:
  """Return the value of the integer constant with this name; raise ValueError if the instruction is not a constant."""
  found = _original(body, name)
  return int(found.operands[0] if found.opcode == 'constant' else '')
