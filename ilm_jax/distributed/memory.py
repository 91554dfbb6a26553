"""The memory of devices and of this host, for checks before anything is allocated."""

import contextlib
import os
from pathlib import Path

import jax


def device_memory() -> float:
  """Return the bytes of memory of a device; for a CPU, those of the host."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') or host_memory()


def host_memory() -> float:
  """Return the bytes of memory that this process may use: those of the machine, or the limit of its control group."""
  sizes = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    with contextlib.suppress(OSError, ValueError):
      sizes.append(int(Path('/sys/fs/cgroup', name).read_text()))
  return min(sizes)


def gigabytes(size: float) -> str:
  """Format a number of bytes, such as '1,234.5 GB'."""
  return f'{size / 1e9:,.1f} GB'
