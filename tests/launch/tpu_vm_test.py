"""launch/tpu_vm.sh: dry runs, and its actions with a fake gcloud command that simulates a TPU VM by a folder."""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tomllib

import launch_helpers as launch
import pytest


def remote_command(words) -> str:
  """Return the shell command that a `gcloud ... ssh` command line runs on the hosts."""
  (command,) = [word.removeprefix('--command=') for word in words if word.startswith('--command=')]
  return command


def test_create_requests_a_queued_resource_and_waits_for_it():
  create, describe = launch.dry_run(
    'tpu_vm.sh', 'create', *launch.TPU, '--type=v5e-8', '--queue', '--spot', '--project=p'
  )
  queued, location = ['gcloud', 'compute', 'tpus', 'queued-resources'], ['--zone=us-west4-a', '--project=p']
  assert create == [
    *[*queued, 'create', 'ilm', *location, '--node-id=ilm', '--spot', '--accelerator-type=v5litepod-8'],
    '--runtime-version=v2-alpha-tpuv5-lite',
  ]
  assert describe == [*queued, 'describe', 'ilm', *location, '--format=value(state.state)']


def test_run_passes_training_flags_to_the_hosts_unchanged():
  (words,) = launch.dry_run('tpu_vm.sh', 'run', *launch.TPU, *launch.RUN, '--max_restarts=3')
  assert words[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh'] and '--worker=all' in words
  remote = shlex.split(remote_command(words))
  start = remote.index('launch/resume.sh')
  assert remote[start - 1] == 'setsid', 'without setsid, the run would end with the SSH connection'
  flags = ['--max_restarts=3', '--pause=60', '--result=../ilm_jax.exit', '--']
  command = [*flags, 'env', 'JAX_PLATFORMS=tpu,cpu', '.venv/bin/python', '-m', 'ilm_jax.main', *launch.RUN]
  assert remote[start + 1 : start + 1 + len(command)] == command


def test_setup_installs_the_code_and_its_dependencies_on_the_hosts():
  bundle, copy, setup = launch.dry_run('tpu_vm.sh', 'setup', *launch.TPU, TMPDIR='/tmp')
  assert bundle == ['git', 'bundle', 'create', '--quiet', '/tmp/ilm_jax-ilm.bundle', 'HEAD']
  assert copy[3:8] == ['tpu-vm', 'scp', bundle[4], 'ilm:ilm_jax.bundle', launch.TPU[1]] and copy[-1] == '--worker=all'
  assert 'git fetch --quiet ../ilm_jax.bundle HEAD' in remote_command(setup) and '--worker=all' in setup
  (setup,) = launch.dry_run('tpu_vm.sh', 'setup', *launch.TPU, '--repo=https://example.com/a b.git', '--ref=v1')
  assert "git fetch --quiet 'https://example.com/a b.git' v1" in remote_command(setup)
  project = tomllib.loads((launch.ROOT / 'pyproject.toml').read_text())['project']
  extras = re.search(r"-e '\.\[(.*)\]'", remote_command(setup))[1].split(',')
  assert 'tpu' in extras and set(extras) <= set(project['optional-dependencies'])
  python = re.search(r'--python=3\.(\d+) ', remote_command(setup))[1]
  assert re.fullmatch(r'>=3\.11(\.\d)?', project['requires-python']) and int(python) >= 11


def test_the_actions_logs_stop_and_delete_call_gcloud_for_the_right_hosts():
  (logs,) = launch.dry_run('tpu_vm.sh', 'logs', *launch.TPU, '--worker=3')
  assert '--worker=3' in logs and remote_command(logs).startswith('tail ')
  (stop,) = launch.dry_run('tpu_vm.sh', 'stop', *launch.TPU)
  assert '--worker=all' in stop and remote_command(stop).startswith('kill -TERM ')
  assert launch.dry_run('tpu_vm.sh', 'delete', *launch.TPU)[0][3:6] == ['tpu-vm', 'delete', 'ilm']
  (delete,) = launch.dry_run('tpu_vm.sh', 'delete', *launch.TPU, '--queue')
  assert delete[3:6] == ['queued-resources', 'delete', 'ilm'] and '--force' in delete


def test_a_dry_run_of_train_prints_the_commands_of_the_actions_create_setup_run_and_delete():
  kind = ['--type=v5e-8', '--spot', '--queue']
  train = launch.dry_run('tpu_vm.sh', 'train', *launch.TPU, *kind, *launch.RUN)
  actions = [('create', kind), ('setup', []), ('run', launch.RUN)]
  first = [words for action, flags in actions for words in launch.dry_run('tpu_vm.sh', action, *launch.TPU, *flags)]
  assert train[: len(first)] == first
  assert train[-1:] == launch.dry_run('tpu_vm.sh', 'delete', *launch.TPU, '--queue')
  assert launch.dry_run('tpu_vm.sh', 'train', *launch.TPU, *kind, *launch.RUN, '--keep') == train[:-1]


# --- a fake cloud -----------------------------------------------------------------------------------------------------

# A fake gcloud. The folder `host` stands for the TPU VM: commands for the hosts run in it. `tpu-vm describe`
# prints the next state in the file `states`, if any is left; the state ERROR makes the call fail.
GCLOUD = """
echo "$3 $4" >> "$CLOUD/calls"
host=$CLOUD/host
case "$3 $4" in
  *' create') mkdir "$host" ;;
  *' delete') rm -r "$host" ;;
  'queued-resources describe') echo ACTIVE ;;
  'tpu-vm describe')
    if [ -s "$CLOUD/states" ]; then
      state=$(head -n 1 "$CLOUD/states"); sed -i 1d "$CLOUD/states"
      [ "$state" != ERROR ] || { echo 'ERROR: the service is unavailable' >&2; exit 1; }
      echo "$state"
    elif [ -d "$host" ]; then echo READY
    else echo "ERROR: NOT_FOUND: Resource 'ilm' was not found" >&2; exit 1
    fi ;;
  *' scp') cp "$5" "$host/${6#*:}" ;;
  *' ssh') for word in "$@"; do
      case $word in --command=*) cd "$host" && HOME=$host PATH=$CLOUD/bin:$PATH bash -c "${word#--command=}" ;; esac
    done ;;
esac
"""
# A fake python3 for the hosts: `python3 -m uv venv` creates a .venv whose Python is the program `main` of the test.
PYTHON = '[ "$3" != venv ] || { mkdir -p .venv/bin && cp "$CLOUD/main" .venv/bin/python; }'
# A fake training run that lasts until `train` has checked the TPU four times. The tests append its exit code.
LAST_FOUR_CHECKS = """
echo start >> "$CLOUD/starts"
checks() { grep -c 'tpu-vm describe' "$CLOUD/calls"; }
last=$(($(checks) + 4))
for _ in $(seq 500); do [ "$(checks)" -lt $last ] || break; sleep 0.02; done
exit """
TRAIN = ['train', '--type=v5e-8', '--spot', '--poll=0', *launch.RUN]


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """Return a git repository with a copy of the launch scripts."""
  folder = tmp_path_factory.mktemp('checkout')
  shutil.copytree(launch.FOLDER, folder / 'launch')
  commit = 'git init -q && git add . && git -c user.name=a -c user.email=a@example.com commit -qm launchers'
  subprocess.run(commit, shell=True, cwd=folder, check=True, capture_output=True)
  return folder


@pytest.fixture
def cloud(tmp_path, checkout):
  """Return a function that runs tpu_vm.sh with the fake gcloud; `main` is the program run instead of Python."""
  launch.write_program(tmp_path / 'local' / 'gcloud', GCLOUD)
  launch.write_program(tmp_path / 'bin' / 'python3', PYTHON)

  def run(main, action, *flags):
    launch.write_program(tmp_path / 'main', main)
    variables = {'PATH': launch.path_with(tmp_path / 'local'), 'CLOUD': tmp_path, 'TMPDIR': tmp_path}
    return launch.call('tpu_vm.sh', action, *launch.TPU, *flags, folder=checkout / 'launch', **variables)

  return run


def changes(tmp_path) -> list[str]:
  """Return the names, create or delete, of the gcloud calls that create or delete a TPU, in order."""
  return [line.split()[-1] for line in launch.lines(tmp_path / 'calls') if line.endswith(('create', 'delete'))]


def test_train_creates_a_new_tpu_after_a_preemption_and_deletes_it_at_the_end(cloud, tmp_path):
  main = """
    echo "$@" >> "$CLOUD/starts"
    # The TPU is preempted during the first run; the second run finishes.
    [ "$(wc -l < "$CLOUD/starts")" -gt 1 ] || { mv "$CLOUD/host" "$CLOUD/gone"; kill -KILL "$PPID"; }
  """
  done = cloud(main, *TRAIN, '--queue')
  assert done.returncode == 0, done.stderr
  assert launch.lines(tmp_path / 'starts') == [' '.join(['-m', 'ilm_jax.main', *launch.RUN])] * 2
  assert changes(tmp_path) == ['delete', 'create', 'delete', 'create', 'delete'], 'delete old resources before create'
  kinds = {line.split()[0] for line in launch.lines(tmp_path / 'calls') if line.endswith(('create', 'delete'))}
  assert kinds == {'queued-resources'}
  assert 'the run was preempted (gone): restarting it (restart 1 of 100)' in done.stderr
  assert done.stderr.splitlines()[-1] == 'tpu_vm.sh: the run has finished' and not (tmp_path / 'host').exists()


def test_train_creates_and_deletes_nothing_if_gcloud_fails(cloud, tmp_path):
  (tmp_path / 'states').write_text('ERROR\n')
  done = cloud('exit 0', *TRAIN)
  assert done.returncode == 1 and done.stderr.splitlines() == [
    'error: ERROR: the service is unavailable',
    'tpu_vm.sh: gcloud failed (see the message above): nothing was created or deleted',
  ]
  assert changes(tmp_path) == []


def test_train_keeps_following_an_active_run_despite_a_tpu_repair_and_a_gcloud_failure(cloud, tmp_path):
  for action, *flags in (['create', '--type=v5e-8'], ['setup'], ['run', *launch.RUN]):
    assert cloud(LAST_FOUR_CHECKS + '0', action, *flags).returncode == 0
  (tmp_path / 'states').write_text('READY\nERROR\nREPAIRING\n')
  done = cloud('', *TRAIN)
  assert done.returncode == 0 and 'unavailable' in done.stderr and changes(tmp_path) == ['create', 'delete']
  assert len(launch.lines(tmp_path / 'starts')) == 1


def test_train_gives_up_on_a_tpu_that_cannot_be_set_up(cloud, tmp_path):
  done = cloud('', *TRAIN, '--repo=/nowhere')
  assert done.returncode == 1 and changes(tmp_path) == ['delete', 'create', 'delete']
  assert sum(line.endswith('ssh') for line in launch.lines(tmp_path / 'calls')) >= 3, 'setup is retried first'


def test_train_reuses_a_tpu_that_an_earlier_run_kept_and_deletes_it_if_the_new_run_fails(cloud, tmp_path):
  done = cloud('exit 0', *TRAIN, '--keep')
  assert done.returncode == 0 and changes(tmp_path) == ['delete', 'create']
  assert 'the TPU is kept, and costs money' in done.stderr
  # The second run fails; `train` must not take the exit code 0 of the first run for that of the second.
  done = cloud('echo "no such config" >&2' + LAST_FOUR_CHECKS + '1', *TRAIN)
  assert done.returncode == 1 and 'no such config' in done.stdout
  assert 'the run did not finish (last status: 1)' in done.stderr
  assert changes(tmp_path) == ['delete', 'create', 'delete'] and not (tmp_path / 'host').exists()


def is_sleeping(pid) -> bool:
  """Return whether a process has a child that runs `sleep`."""
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  with contextlib.suppress(OSError):  # the child may have ended
    return any(pathlib.Path(f'/proc/{child}/comm').read_text() == 'sleep\n' for child in children)
  return False


def test_ctrl_c_ends_the_train_action_but_not_the_training_run_which_the_stop_action_ends(cloud, tmp_path, checkout):
  assert cloud(launch.RUN_UNTIL_SIGNAL, 'create', '--type=v5e-8').returncode == 0
  variables = {'PATH': launch.path_with(tmp_path / 'local'), 'CLOUD': tmp_path, 'TMPDIR': tmp_path}
  command = ['bash', checkout / 'launch' / 'tpu_vm.sh', TRAIN[0], *launch.TPU, *TRAIN[1:], '--poll=30']
  for _ in range(2):  # the second `train` follows the run of the first
    with launch.running(command, tmp_path, **variables) as process:
      # Interrupt the sleep between two status checks: bash can lose a signal while it starts a command.
      launch.wait_for(lambda process=process: is_sleeping(process.pid))
      os.killpg(process.pid, signal.SIGINT)
      assert process.wait(10) == 130
    assert 'the run continues, and the TPU still costs money' in (tmp_path / 'stderr').read_text()
  host = tmp_path / 'host'
  launch.wait_for_start(host / 'ilm_jax')
  again = cloud(launch.RUN_UNTIL_SIGNAL, 'run', *launch.RUN)
  assert again.returncode == 1 and 'a run is already active on this TPU: stop it first' in again.stderr
  assert len(launch.lines(host / 'ilm_jax' / 'starts')) == 1 and changes(tmp_path) == ['create']
  assert sum(line.endswith('scp') for line in launch.lines(tmp_path / 'calls')) == 1, 'the code is installed once'
  assert cloud(launch.RUN_UNTIL_SIGNAL, 'stop').returncode == 0
  launch.wait_for(lambda: launch.lines(host / 'ilm_jax.exit'))
  assert launch.lines(host / 'ilm_jax.exit') == ['75'] and launch.lines(host / 'ilm_jax' / 'received') == ['TERM']
  assert 'stopped by a signal' in (host / 'ilm_jax.log').read_text()
