"""Memory sizes of devices and of this host, by which settings are checked before anything is allocated."""

import contextlib
import os
from pathlib import Path

import jax


def device_memory() -> float:
  """Return the memory of one device in bytes; the memory of the host if the device is a CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') or host_memory()


def host_memory() -> float:
  """Return the memory that this process may use, in bytes: the machine's, or its cgroup's limit if that is lower."""
  sizes = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    with contextlib.suppress(OSError, ValueError):
      sizes.append(int(Path('/sys/fs/cgroup', name).read_text()))
  return min(sizes)


def gigabytes(size: float) -> str:
  """Format a number of bytes, such as '1,234.5 GB'."""
  return f'{size / 1e9:,.1f} GB'
