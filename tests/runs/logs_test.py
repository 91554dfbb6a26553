"""Event files are read and deleted only in the given folder, even if its name looks like a glob pattern."""

import pytest

from ilm_jax.runs import logs


@pytest.mark.parametrize(('name', 'sibling'), [('z[1]', 'z1'), ('a*', 'ab'), ('a?', 'ab'), ('[z]', 'z')])
def test_the_event_files_of_another_run_are_neither_read_nor_deleted(name, sibling, tmp_path):
  for number, folder in enumerate((name, sibling)):
    writer = logs.SummaryWriter(str(tmp_path / folder))
    writer.write_scalars(1, {'loss': float(number)})
    writer.close()
  assert logs.read_scalars(tmp_path / name) == {'loss': [(1, 0.0)]}
  logs.forget_after(tmp_path / name, 0)
  assert logs.read_scalars(tmp_path / name) == {}
  assert logs.read_scalars(tmp_path / sibling) == {'loss': [(1, 1.0)]}
