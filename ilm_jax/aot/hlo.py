"""What a compiled program says of itself: its collectives and what it moves, read from its text (HLO)."""

import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}  # fmt: skip
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_COLLECTIVE = re.compile(rf' = (.+?) ({"|".join(KINDS)})(-start)?\(')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\]')


class Collective(NamedTuple):
  """A collective operation of a program."""

  kind: str
  size: int  # bytes of its result, on each device
  group: int  # devices that take part in one
  times: int  # a run of the program
  certain: bool  # False: within a loop of unknown length, counted as one turn
  where: str  # op_name of the source

  def traffic(self) -> float:
    """Bytes that a device sends in a run of the program, on a ring."""
    share = (self.group - 1) / self.group
    once = {
      'all-gather': share * self.size,
      'all-reduce': 2 * share * self.size,
      'reduce-scatter': (self.group - 1) * self.size,
      'all-to-all': share * self.size,
      'collective-permute': self.size,
    }[self.kind]
    return once * self.times


def collectives(text: str, devices: int) -> list[Collective]:
  """The collectives of a compiled program of so many devices, each once: parts of one share their channel."""
  bodies, entry = _computations(text)
  times = _times(bodies, entry)
  found = {}
  for name, lines in bodies.items():
    runs, certain = times.get(name, (0, True))
    for line in lines:
      match = _COLLECTIVE.search(line)
      if not match or not runs:
        continue
      shape, kind, start = match.groups()
      size, group = _size(shape, kind, bool(start)), _group(line, devices)
      if name.startswith('all-reduce-scatter'):  # how a TPU program spells it: an all-reduce in a fusion of that name
        kind, size = 'reduce-scatter', size // group
      made = Collective(kind, size, group, runs, certain, _between(line, 'op_name="', '"'))
      channel = re.search(r'channel_id=(\d+)', line)
      key = (kind, channel[1]) if channel else (name, line)
      if key not in found or found[key].size * found[key].times < made.size * made.times:
        found[key] = made
  return sorted(found.values(), key=lambda one: -one.traffic())


# --- memory -----------------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(([^()]*)\)')
_PLACED = re.compile(r'\b(\w+)\[([\d,]*)\](\{[^{}]*\})?')
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'iota',
         'partition-id', 'replica-id', 'after-all')  # fmt: skip


class _Instruction(NamedTuple):
  name: str
  kind: str
  arrays: list[tuple[int, bool]]  # of its result: bytes, and whether in the device's memory rather than on the chip
  operands: list[str]
  root: bool
  line: str

  def size(self) -> int:
    return sum(size for size, _ in self.arrays)

  def here(self) -> int:
    return sum(size for size, here in self.arrays if here)


def moved(text: str) -> int:
  """Bytes that a run of a program reads from a device's memory and writes there, by its text.

  Operands and results of each instruction, as often as its loop turns (once, where that is not known), but of what is
  sliced or updated in place the part alone, and nothing of what the compiler keeps on the chip (S(1) in a layout).
  """
  lines, entry = _computations(text)
  times = _times(lines, entry)
  bodies = {name: [found for line in body if (found := _instruction(line))] for name, body in lines.items()}
  inner = {
    _word(one.line, word)
    for body in bodies.values()
    for one in body
    for word in ('calls=', 'to_apply=')
    if one.kind not in ('call', 'while')
  }
  return sum(times[name][0] * _moved(body, bodies) for name, body in bodies.items() if name not in inner)


def _instruction(line: str) -> _Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  root, name, shape, kind, operands = found.groups()
  arrays = [
    (_size(f'{dtype}[{dims}]', '', False), 'S(' not in layout) for dtype, dims, layout in _PLACED.findall(shape)
  ]
  return _Instruction(name, kind, arrays, _names(operands), bool(root), line)


def _names(operands: str) -> list[str]:
  return [one.split()[-1].lstrip('%') for one in re.sub(r'/\*.*?\*/', '', operands).split(',') if one.strip()]


def _moved(body: list[_Instruction], bodies: dict) -> int:
  known, total = {one.name: one for one in body}, 0
  for one in body:
    if one.kind in _FREE or one.kind.endswith('-done'):
      continue
    operands = [known[name] for name in one.operands if name in known]
    if one.kind == 'copy-start':
      total += sum(size for size, here in one.arrays[:2] if here)
    elif one.kind in ('slice-start', 'dynamic-slice', 'slice', 'gather'):
      part = one.arrays[one.kind == 'slice-start']
      total += part[0] * (bool(operands and operands[0].here()) + part[1])
    elif one.kind == 'dynamic-update-slice':
      total += 2 * operands[1].size() if one.here() and len(operands) > 1 else 0
    elif one.kind == 'fusion':
      total += _fused(one, operands, bodies.get(_word(one.line, 'calls='), []))
    else:
      results = one.arrays
      if one.kind.endswith('-start') and len(results) > len(operands):  # (what comes in, what goes out, contexts)
        results = results[len(operands) : 2 * len(operands)]
      total += sum(size for size, here in results if here) + sum(operand.here() for operand in operands)
  return total


def _fused(one: _Instruction, operands: list[_Instruction], body: list[_Instruction]) -> int:
  """What a fusion reads and writes: of arrays that it slices or updates, the parts."""
  known, total = {inner.name: inner for inner in body}, 0
  slots = {int(inner.line.split('parameter(')[1].split(')')[0]): inner for inner in body if inner.kind == 'parameter'}
  for slot, operand in enumerate(operands):
    users = [inner for inner in body if slot in slots and slots[slot].name in inner.operands]
    firsts = [inner.kind for inner in users if inner.operands[0] == slots[slot].name]
    if users and len(firsts) == len(users) and set(firsts) <= {'dynamic-slice', 'slice', 'gather'}:
      total += bool(operand.here()) * min(operand.size(), sum(inner.size() for inner in users))
    elif not (users and len(firsts) == len(users) and set(firsts) == {'dynamic-update-slice'}):
      total += operand.here()
  root = next((inner for inner in body if inner.root), None)
  results = [known.get(name) for name in root.operands] if root and root.kind == 'tuple' else [root]
  for (size, here), result in zip(one.arrays, results, strict=False):
    while result and result.kind == 'bitcast' and result.operands[0] in known:
      result = known[result.operands[0]]
    updates = result and result.kind == 'dynamic-update-slice' and known.get(result.operands[1])
    total += here * (updates.size() if updates else size)
  return total


# --- computations and their loops -------------------------------------------------------------------------------------


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies, entry, current = {}, '', None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = bodies.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None:
      current.append(line)
  return bodies, entry


def _times(bodies: dict, entry: str) -> dict[str, tuple[int, bool]]:
  """How often each computation runs, and whether that is certain."""
  calls = defaultdict(list)
  for name, lines in bodies.items():
    for line in lines:
      loop = ' while(' in line
      trips = _turns(bodies, lines, line) if loop else 1
      for one, several in _CALLED.findall(line):
        for called in [one] if one else re.findall(r'%?([\w.\-]+)', several):
          calls[name].append((called, trips or 1, trips is not None))
  out = defaultdict(lambda: (0, True))

  def visit(name, times, certain):
    if name not in bodies:
      return
    before = out[name]
    out[name] = before[0] + times, before[1] and certain
    for called, more, sure in calls[name]:
      visit(called, times * more, certain and sure)

  visit(entry, 1, True)
  return out


def _turns(bodies: dict, lines: list[str], loop: str) -> int | None:
  """The turns of a loop among these lines: as noted, or of a counter from 0 up to below a constant; None: unknown."""
  if noted := _TRIPS.search(loop):
    return int(noted[1])
  start, condition, body = (_word(loop, before) for before in (' while(', 'condition=', 'body='))
  if condition not in bodies or body not in bodies:
    return None
  condition, body = bodies[condition], bodies[body]
  less = re.search(r' compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT', _root(condition))
  index = less and re.search(r' get-tuple-element\(.*index=(\d+)', _definition(condition, less[1]))
  if not index:
    return None
  at = slice(int(index[1]), int(index[1]) + 1)
  first, following = _operands(_definition(lines, start), 'tuple')[at], _operands(_root(body), 'tuple')[at]
  before, by = (_operands(_definition(body, following[0]), 'add') if following else []) or ('', '')
  limit, step = _constant(condition, less[2]), _constant(body, by)
  counts = first and _constant(lines, first[0]) == 0 and f'index={index[1]}' in _original(body, before).split(', ')
  return -(-limit // step) if counts and limit is not None and step else None


def _constant(lines: list[str], name: str) -> int | None:
  """The number that a name stands for, through copies."""
  value = re.search(r' constant\((\d+)\)', _original(lines, name))
  return int(value[1]) if value else None


def _original(lines: list[str], name: str) -> str:
  """The line that defines a name, or what it is a copy of."""
  line = _definition(lines, name)
  while copied := _operands(line, 'copy'):
    line = _definition(lines, copied[0])
  return line


def _word(line: str, before: str) -> str:
  found = re.search(rf'{re.escape(before)}%?([\w.\-]+)', line)
  return found[1] if found else ''


def _root(lines: list[str]) -> str:
  return next((line for line in lines if line.lstrip().startswith('ROOT ')), '')


def _definition(lines: list[str], name: str) -> str:
  return next((line for line in lines if re.match(rf'\s*(ROOT )?%?{re.escape(name)} = ', line)), '')


def _operands(line: str, kind: str) -> list[str]:
  found = re.search(rf' {kind}\(([^()]*)\)', line)
  return _names(found[1]) if found else []


def _size(shape: str, kind: str, start: bool) -> int:
  sizes = []
  for dtype, dims in _ARRAY.findall(shape):
    if dtype in BYTES:
      count = 1
      for dim in filter(None, dims.split(',')):
        count *= int(dim)
      sizes.append(int(count * BYTES[dtype]))
  if start and kind == 'all-gather':  # (what comes in, what goes out), each perhaps several
    return sum(sizes[len(sizes) // 2 :])
  if start and kind == 'collective-permute':  # (what comes in, what goes out, contexts)
    return sizes[min(1, len(sizes) - 1)]
  return sum(sizes)


def _group(line: str, devices: int) -> int:
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(match[2])
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    group = 1
    for axis in re.findall(r"'(\w+)'", match[2]):
      group *= int(sizes[axis])
    return group
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(match[1].split(','))
  if 'source_target_pairs=' in line:
    return 2
  return devices


def _between(line: str, start: str, end: str) -> str:
  return line.split(start, 1)[1].split(end, 1)[0] if start in line else ''
