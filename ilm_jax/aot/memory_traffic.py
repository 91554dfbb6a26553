"""Estimate how many bytes a compiled program reads from and writes to a device's memory (HBM)."""

from ilm_jax.aot.hlo import Instruction, Program, root_of

_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'iota',
         'partition-id', 'replica-id', 'after-all')  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')


def bytes_moved(program: Program) -> int:
  """Return the bytes that the instructions of a program read from and write to memory.

  An instruction in a loop counts once per iteration, or once if the number of iterations is unknown. An array that is
  sliced or updated in place counts only with the affected part.
  """
  bodies = program.computations
  fused = {
    instruction.attribute(name)
    for body in bodies.values()
    for instruction in body.values()
    for name in ('calls', 'to_apply')
    if instruction.opcode not in ('call', 'while')
  }
  return sum(program.runs[name][0] * _moved(body, bodies) for name, body in bodies.items() if name not in fused)


def _moved(body: dict[str, Instruction], bodies: dict) -> int:
  """Return the bytes that one execution of a computation reads from and writes to memory."""
  total = 0
  for one in body.values():
    if one.opcode in _FREE or one.opcode.endswith('-done'):
      continue
    operands = [body[name] for name in one.operands if name in body]
    if one.opcode == 'copy-start':
      total += sum(array.size for array in one.arrays[:2] if array.in_memory)
    elif one.opcode in ('slice-start', *_SLICES):
      part = one.arrays[one.opcode == 'slice-start']
      total += part.size * (bool(operands and operands[0].size_in_memory()) + part.in_memory)
    elif one.opcode == 'dynamic-update-slice':
      total += 2 * operands[1].size() if one.size_in_memory() and len(operands) > 1 else 0
    elif one.opcode == 'fusion':
      total += _fusion(one, operands, bodies.get(one.attribute('calls'), {}))
    else:
      results = one.arrays
      if one.opcode.endswith('-start') and len(results) > len(operands):  # returns (inputs, results, contexts)
        results = results[len(operands) : 2 * len(operands)]
      total += sum(array.size for array in results if array.in_memory) + sum(x.size_in_memory() for x in operands)
  return total


def _fusion(one: Instruction, operands: list[Instruction], body: dict[str, Instruction]) -> int:
  """Return the bytes that a fusion reads and writes; of an array that it slices or updates, only that part."""
  total = 0
  parameters = {int(inner.operands[0]): inner.name for inner in body.values() if inner.opcode == 'parameter'}
  for slot, operand in enumerate(operands):
    users = [inner for inner in body.values() if slot in parameters and parameters[slot] in inner.operands]
    first = [inner.opcode for inner in users if inner.operands[0] == parameters[slot]]
    only_first = bool(users) and len(first) == len(users)
    if only_first and set(first) <= set(_SLICES):
      total += bool(operand.size_in_memory()) * min(operand.size(), sum(inner.size() for inner in users))
    elif not (only_first and set(first) == {'dynamic-update-slice'}):
      total += operand.size_in_memory()
  root = root_of(body) if body else None
  results = [body.get(name) for name in root.operands] if root and root.opcode == 'tuple' else [root]
  for array, result in zip(one.arrays, results, strict=False):
    while result and result.opcode == 'bitcast' and result.operands[0] in body:
      result = body[result.operands[0]]
    update = result and result.opcode == 'dynamic-update-slice' and body.get(result.operands[1])
    total += array.in_memory * (update.size() if update else array.size)
  return total
