"""Costs of a compiled program on a TPU chip: memory, arithmetic, and a lower bound on its time (roofline)."""

from typing import NamedTuple

from ilm_jax.aot import collectives, hlo, memory_traffic

GIB = 2**30


class Chip(NamedTuple):
  """Published limits of a TPU chip (cloud.google.com/tpu/docs has a page for each version)."""

  memory: float  # HBM size in bytes; the compiler reserves a little of it
  flops: float  # peak bfloat16 operations per second
  hbm: float  # HBM bandwidth, bytes per second
  ici: float  # bytes per second that a chip can send over all its links (ICI)


CHIPS = {
  'v4': Chip(32 * GIB, 275e12, 1228e9, 300e9),
  'v5e': Chip(16 * GIB, 197e12, 819e9, 200e9),
  'v5p': Chip(95 * GIB, 459e12, 2765e9, 600e9),
  'v6e': Chip(32 * GIB, 918e12, 1640e9, 400e9),
}


def training_flops(cfg, rows: int, length: int, targets: int, *, again: bool = True) -> float:
  """Return the floating-point operations of the matrix products of a training step.

  Per position: 8 D^2 (queries, keys, values, output), 4 D F (MLP) and 4 L D (scores, weighted values) in each block,
  and 2 V D in the vocabulary head; per target 2 D. The backward pass takes twice as many operations. `again` adds the
  recomputation in the backward pass (the head's logits, and with `cfg.remat` the blocks), which does not count for MFU.
  """
  D, F = cfg.d_model, cfg.d_ff
  blocks = cfg.num_layers * (8 * D * D + 4 * D * F + 4 * length * D)
  head = 2 * cfg.vocab_size * D
  once = rows * (length * (blocks + head) + 2 * D * targets)
  return 3 * once + (rows * length * (head + cfg.remat * blocks) if again else 0)


def memory_of(compiled) -> dict[str, int]:
  """Return the bytes that a compiled program needs on each device: arguments, temporary arrays, program, and peak."""
  stats = compiled.memory_analysis()
  code, temporary = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
  parts = {'arguments': stats.argument_size_in_bytes, 'temporary': temporary, 'program': code}
  return parts | {'peak': sum(parts.values()) + stats.output_size_in_bytes - stats.alias_size_in_bytes}


def describe(compiled, devices: int, chip: Chip | None, seconds: float) -> list[str]:
  """Return lines of text about a compiled program's memory and collectives; `seconds` is the compilation time."""
  memory = memory_of(compiled)
  verdict = 'fits' if chip and memory['peak'] <= chip.memory else 'DOES NOT FIT'
  fits = f' of {chip.memory / GIB:.0f}: {verdict}' if chip else ''
  parts = ', '.join(f'{name} {size / GIB:.2f}' for name, size in memory.items() if name != 'peak')
  lines = [f'  compiled in {seconds:.0f} s', f'  memory per device, GiB: {memory["peak"] / GIB:.2f}{fits} ({parts})']
  found = collectives.collectives(hlo.parse(compiled.as_text()), devices)
  for kind in collectives.KINDS:
    if ones := [one for one in found if one.kind == kind]:
      unsure = '' if all(one.certain for one in ones) else ' at least (some are in loops of unknown length)'
      count, sent = sum(one.times for one in ones), sum(one.traffic() for one in ones)
      largest = max(ones, key=lambda one: one.size)
      lines.append(f'  {kind}: {count} per step, {sent / 1e6:,.1f} MB sent per device{unsure}; the largest: '
                   f'{largest.size / 1e6:,.1f} MB, {largest.where[:100] or "?"}')  # fmt: skip
  return lines


def roofline(compiled, flops: float, useful: float, devices: int, chip: Chip) -> list[str]:
  """Return a line with a lower bound on the time of a training step: the largest of its arithmetic, HBM and ICI times.

  `flops` includes recomputation; `useful` does not, and gives the MFU. All `devices` together execute these operations.
  """
  program = hlo.parse(compiled.as_text())
  sent = sum(one.traffic() for one in collectives.collectives(program, devices))
  moved = memory_traffic.bytes_moved(program)
  times = {'arithmetic': flops / devices / chip.flops, 'HBM': moved / chip.hbm, 'ICI': sent / chip.ici}
  limit = max(times, key=times.get)
  parts = ', '.join(f'{name} {1e3 * seconds:.1f}' for name, seconds in times.items())
  return [
    f'  predicted from published limits, minimum ms per step: {parts}; limited by {limit}, MFU at most '
    f'{100 * useful / devices / chip.flops / times[limit]:.0f} %'
  ]
