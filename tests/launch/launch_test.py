"""launch/: the plans of the launchers, the restarts with stubs for what is started, the manifests, the README."""

import contextlib
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import kubernetes_validate
import pytest
import small
import yaml

LAUNCH = small.ROOT / 'launch'
SCRIPTS = ['common.sh', 'resume.sh', 'gpu.sh', 'tpu_vm.sh', 'slurm.sbatch', 'table.sh', 'fits.sh']
MANIFESTS = ['gke_jobset.yaml', 'gke_jobset_gpu.yaml']
AWKWARD = ["--config.task.label=it's a b, $HOME", '--config.task.names=x,y', '--config.eval.note=']
RUN = ['--config=configs/star.py:hard', '--workdir=gs://bucket/hard', *AWKWARD]
TPU = ['--name=ilm', '--zone=us-west4-a']


def environment(**variables) -> dict:
  """This process's, without what Slurm or a shell may have set."""
  keep = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_') and k != 'PYTHON'}
  return keep | {k: str(v) for k, v in variables.items()}


def call(script, *arguments, folder=LAUNCH, **variables):
  return subprocess.run(
    ['bash', folder / script, *arguments],
    **{'env': environment(**variables), 'cwd': folder.parent, 'stdin': subprocess.DEVNULL, 'timeout': 60},
    capture_output=True,
    text=True,
  )


def plan(script, *arguments, **variables) -> list[list[str]]:
  """The words of each command that a dry run prints."""
  done = call(script, *arguments, '--dry_run', **variables)
  assert done.returncode == 0, done.stderr
  return [words for line in done.stdout.splitlines() if (words := shlex.split(line, comments=True))]


def stub(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)
  return path


def lines(path) -> list[str]:
  return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=10.0):
  """Poll until it holds; fail when it does not."""
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, 'waited in vain'
    time.sleep(0.02)


# --- every script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_parses(name):
  done = subprocess.run(['bash', '-n', LAUNCH / name], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr


def test_shellcheck_finds_nothing():
  tool = shutil.which('shellcheck') or shutil.which('shellcheck', path=pathlib.Path(sys.executable).parent)
  if tool is None:
    pytest.skip('no shellcheck here')
  done = subprocess.run([tool, '-x', *(f'launch/{name}' for name in SCRIPTS)], cwd=small.ROOT, capture_output=True)
  assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize('name', [*SCRIPTS[1:], *MANIFESTS, '../Dockerfile'])
def test_the_header_says_where_it_was_last_run(name):
  header = re.match(r'(#.*\n)+', (LAUNCH / name).read_text())[0]
  assert re.search(r'^# Last really (run|built): \S+', header, re.M)


@pytest.mark.parametrize('name', ['resume.sh', 'gpu.sh', 'tpu_vm.sh', 'slurm.sbatch', 'fits.sh'])
def test_help_is_the_header(name):
  done = call(name, '--help')
  assert done.returncode == 0 and not done.stderr
  assert f'launch/{name}' in done.stdout and 'Last really run' in done.stdout
  assert not re.search(r'^#', done.stdout, re.M) and 'pipefail' not in done.stdout


def test_a_dry_run_runs_nothing(tmp_path):
  for name in ['gcloud', 'git', 'make', 'srun', 'scontrol', 'env', 'python']:
    stub(tmp_path / 'bin' / name, f'[ "$1" = diff ] || echo {name} >> {tmp_path}/ran')
  path = f'{tmp_path}/bin:{os.environ["PATH"]}'
  plan('gpu.sh', *RUN, PATH=path)
  plan('slurm.sbatch', *RUN, PATH=path, SLURM_GPUS_ON_NODE=8)
  plan('tpu_vm.sh', 'train', *TPU, '--type=v5e-8', '--queue', *RUN, PATH=path)
  plan('fits.sh', PATH=path)
  assert call('resume.sh', '--dry_run', '--', 'python', 'a b', PATH=path).stdout == "python 'a b'\n"
  assert not (tmp_path / 'ran').exists()


MISTAKES = [  # script, arguments, what the line says
  ('resume.sh', [], 'no command'),
  ('resume.sh', ['--'], 'no command'),
  ('resume.sh', ['python'], 'python: expected --max_restarts'),
  ('resume.sh', ['--max_restart=3', '--', 'true'], '--max_restart=3: expected --max_restarts='),
  ('resume.sh', ['--max_restarts=many', '--', 'true'], '--max_restarts=many: expected a whole number'),
  ('resume.sh', ['--pause=', '--', 'true'], '--pause=: expected a whole number'),
  ('gpu.sh', ['--workdir=runs/x'], '--config is missing'),
  ('fits.sh', ['--topology=v5e:4x4'], '--topology=v5e:4x4: expected v5e:2x4, v5e:16x16,'),
  ('gpu.sh', [*RUN, '--steps=3'], '--steps=3: unknown'),
  ('gpu.sh', ['--config', 'configs/star.py'], '--config: unknown'),
  ('gpu.sh', [*RUN, '--max_restarts=-1'], '--max_restarts=-1: expected a whole number'),
  ('slurm.sbatch', ['--workdir=/shared/x'], '--config is missing'),
  ('slurm.sbatch', ['--config=configs/star.py'], '--workdir is missing'),
  ('slurm.sbatch', [*RUN, '--nodes=2'], '--nodes=2: unknown'),
  ('tpu_vm.sh', [], 'no action: expected train, create, setup, run, logs, stop or delete'),
  ('tpu_vm.sh', ['start', *TPU], 'start: expected train,'),
  ('tpu_vm.sh', ['delete', '--zone=z'], '--name is missing'),
  ('tpu_vm.sh', ['delete', '--name=n'], '--zone is missing'),
  ('tpu_vm.sh', ['create', *TPU], '--type is missing'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v7-8'], '--type=v7-8: unknown; known are v4-N, v5e-N, v5p-N and v6e-N'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e'], '--type=v5e: unknown; known are'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e-12'], '--type=v5e-12: expected one of 1 4 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v6e-'], '--type=v6e-: expected one of 1 4 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v4-4'], '--type=v4-4: expected a multiple of 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5p-x'], '--type=v5p-x: expected a multiple of 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e-8', '--sopt'], '--sopt: unknown'),
  ('tpu_vm.sh', ['logs', *TPU, '--worker=all'], '--worker=all: expected a whole number'),
  ('tpu_vm.sh', ['run', *TPU, '--workdir=gs://b/x'], '--config is missing'),
  ('tpu_vm.sh', ['run', *TPU, RUN[0]], '--workdir=: expected gs://BUCKET/FOLDER'),
  ('tpu_vm.sh', ['train', *TPU, '--type=v5e-8', RUN[0], '--workdir=runs/x'], '--workdir=runs/x: expected gs://'),
]


@pytest.mark.parametrize(('script', 'arguments', 'says'), MISTAKES)
def test_a_mistake_is_one_line(script, arguments, says, tmp_path):
  stub(tmp_path / 'gcloud', 'echo called >&2')
  done = call(script, *arguments, PATH=f'{tmp_path}:{os.environ["PATH"]}')
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith(f'{script}: {says}') and done.stderr.count('\n') == 1


# --- the restarts -----------------------------------------------------------------------------------------------------

# Ends with the codes of a file in turn, those above 128 by a signal.
ENDS = """
ulimit -c 0
echo start >> starts
code=$(head -n 1 codes); sed -i 1d codes
[ "$code" -lt 128 ] || kill -$((code - 128)) $$
exit "$code"
"""
# Runs until it is told to stop, then saves.
RUNS = """
trap 'echo TERM >> got; exit 75' TERM
trap 'echo INT >> got; exit 130' INT
echo start >> starts
for _ in $(seq 500); do sleep 0.02; done
"""


@pytest.fixture
def resume(tmp_path):
  """Run launch/resume.sh on a command that ends with these codes: returns how it ended, and how many starts it took."""

  def run(codes, *arguments, command=None, **variables):
    (tmp_path / 'codes').write_text('\n'.join(map(str, codes)))
    command = command or [stub(tmp_path / 'ends', ENDS)]
    flags = ['--pause=0', *arguments, '--', *command]
    done = subprocess.run(
      ['bash', LAUNCH / 'resume.sh', *flags],
      **{'cwd': tmp_path, 'env': environment(**variables), 'capture_output': True, 'text': True, 'timeout': 60},
    )
    return done, len(lines(tmp_path / 'starts'))

  return run


def test_a_preempted_run_is_started_again_until_it_finishes(resume):
  done, starts = resume([75, 75, 0])
  assert (done.returncode, starts) == (0, 3)
  said = done.stderr.splitlines()
  assert len(said) == 2 and all('preempted, and saved: restarting in' in line for line in said)
  assert '(1 of 100)' in said[0] and '(2 of 100)' in said[1]


@pytest.mark.parametrize(('code', 'says'), [(1, 'an error'), (2, 'an error'), (130, 'Ctrl-C'), (253, 'an error')])
def test_an_error_and_a_ctrl_c_are_the_end(resume, code, says):
  done, starts = resume([code, 0], command=['sh', '-c', f'echo start >> starts; exit {code}'])
  assert (done.returncode, starts) == (code, 1)
  assert says in done.stderr and 'not restarted' in done.stderr and done.stderr.count('\n') == 1


CAUSES = {134: 'another host died', 135: 'signal 7', 137: 'out of memory', 139: 'segmentation fault', 143: 'before it'}


@pytest.mark.parametrize('code', CAUSES)
def test_a_killed_run_is_started_again_and_the_line_names_the_cause(resume, code):
  done, starts = resume([code, 0])
  assert (done.returncode, starts) == (0, 2)
  assert f'exit code {code}: ' in done.stderr and CAUSES[code] in done.stderr
  assert 'restarting in 0 s (1 of 100)' in done.stderr and done.stderr.count('\n') == 1


def test_it_gives_up_after_max_restarts(resume):
  done, starts = resume([75] * 9, '--max_restarts=2')
  assert (done.returncode, starts) == (75, 3)
  assert 'it was 2 times (--max_restarts)' in done.stderr.splitlines()[-1]


def test_what_dies_at_once_five_times_in_a_row_is_not_started_again(resume):
  done, starts = resume([134] * 9)
  assert (done.returncode, starts) == (134, 5)
  assert 'within a minute of its start 5 times in a row' in done.stderr.splitlines()[-1]


def test_what_dies_after_a_minute_is_started_again_and_again(resume, tmp_path):
  """The clock of the shell is put forward by two minutes while the fourth process runs."""
  clock = tmp_path / 'clock'
  clock.write_text(
    """trap '[ "$BASH_COMMAND" != await ] || [ "${restarts:-}" != 3 ] || SECONDS=$((SECONDS + 120))' DEBUG"""
  )
  done, starts = resume([134] * 7 + [0], BASH_ENV=clock)
  assert (done.returncode, starts) == (0, 8), done.stderr


def test_an_exit_code_can_be_handed_on(resume):
  done, starts = resume([137, 75, 0], '--stop_on=75')
  assert (done.returncode, starts) == (75, 2)


@pytest.mark.parametrize('code', [0, 1])
def test_the_result_is_written(resume, tmp_path, code):
  done, _ = resume([75, code], '--result=result')
  assert done.returncode == code and lines(tmp_path / 'result') == [str(code)]


def test_the_command_gets_its_arguments_as_they_are(resume, tmp_path):
  command = [stub(tmp_path / 'says', 'printf "%s\\n" "$@" > got'), *AWKWARD]
  done, _ = resume([], command=command)
  assert done.returncode == 0 and lines(tmp_path / 'got') == AWKWARD


def listen():
  """Hear signals that whoever runs the tests ignores (nohup, a shell's background): bash cannot trap those."""
  for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def running(command, folder, **variables):
  """A process of its own session, so that nothing of it outlives the test."""
  with open(folder / 'stderr', 'w') as stderr:
    process = subprocess.Popen(
      command, cwd=folder, stderr=stderr, env=environment(**variables), start_new_session=True, preexec_fn=listen
    )
  try:
    yield process
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()


@pytest.mark.parametrize(('number', 'passed', 'code'), [('TERM', 'TERM', 75), ('HUP', 'TERM', 75), ('INT', 'INT', 130)])
def test_a_signal_is_passed_on_once_and_ends_it(tmp_path, number, passed, code):
  command = ['bash', LAUNCH / 'resume.sh', '--pause=0', '--', stub(tmp_path / 'runs', RUNS)]
  with running(command, tmp_path) as process:
    wait_for(lambda: lines(tmp_path / 'starts'))
    time.sleep(0.1)
    os.killpg(process.pid, signal.Signals[f'SIG{number}'])  # as a terminal does: to the whole foreground group
    assert process.wait(10) == code
  assert lines(tmp_path / 'got') == [passed] and len(lines(tmp_path / 'starts')) == 1
  assert 'told to stop; ' in (tmp_path / 'stderr').read_text()


def test_a_suspended_command_is_not_taken_for_a_dead_one(tmp_path):
  command = ['bash', LAUNCH / 'resume.sh', '--pause=0', '--', stub(tmp_path / 'runs', f'echo $$ > pid\n{RUNS}')]
  with running(command, tmp_path) as process:
    wait_for(lambda: lines(tmp_path / 'starts'))
    pid = int(lines(tmp_path / 'pid')[0])
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(10) == 75
  assert len(lines(tmp_path / 'starts')) == 1 and 'restarting' not in (tmp_path / 'stderr').read_text()


def test_a_signal_ends_the_pause_before_a_restart(tmp_path):
  (tmp_path / 'codes').write_text('75\n0\n')
  command = ['bash', LAUNCH / 'resume.sh', '--pause=50', '--', stub(tmp_path / 'ends', ENDS)]
  with running(command, tmp_path) as process:
    wait_for(lambda: 'restarting' in (tmp_path / 'stderr').read_text())
    time.sleep(0.1)
    process.terminate()
    assert process.wait(10) == 75
  assert len(lines(tmp_path / 'starts')) == 1


# --- a GPU host -------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_gpu_host():
  train = ['.venv/bin/python', '-m', 'ilm_jax.main', *RUN]
  resume = ['env', 'JAX_PLATFORMS=cuda,cpu', 'launch/resume.sh', '--max_restarts=7', '--pause=10', '--']
  assert plan('gpu.sh', *RUN, '--max_restarts=7') == [['make', 'setup', 'EXTRAS=cuda'], [*resume, *train]]
  assert plan('gpu.sh', *RUN, PYTHON='/opt/my python')[0][6:] == ['/opt/my python', *train[1:]]


def test_one_of_several_gpu_hosts_waits_for_the_others_to_notice():
  hosts = ['--coordinator=10.0.0.1:8476', '--num_processes=2', '--process_id=1']
  words = plan('gpu.sh', *RUN, *hosts)[-1]
  assert words[-3:] == hosts and '--pause=60' in words


def test_gpu_sh_becomes_the_loop(tmp_path):
  """It is replaced by it, so that a signal to it is a signal to the loop."""
  python = stub(tmp_path / 'python', RUNS.replace('got', f'{tmp_path}/got').replace('starts', f'{tmp_path}/starts'))
  with running(['bash', LAUNCH / 'gpu.sh', *RUN], tmp_path, PYTHON=python) as process:
    wait_for(lambda: lines(tmp_path / 'starts'))
    time.sleep(0.1)
    process.terminate()
    assert process.wait(10) == 75
  assert lines(tmp_path / 'got') == ['TERM']


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_slurm_job():
  one, two = plan('slurm.sbatch', *RUN, SLURM_GPUS_ON_NODE=4, SLURM_JOB_ID=7, PYTHON='python')
  assert one[:3] == ['env', 'JAX_LOCAL_DEVICE_IDS=0,1,2,3', 'JAX_PLATFORMS=cuda,cpu']
  step = one.index('srun')
  assert one[3:step] == ['launch/resume.sh', '--max_restarts=100', '--stop_on=75', '--']
  assert {'--ntasks-per-node=1', '--kill-on-bad-exit=0'} <= set(one[step:])
  assert one[-3 - len(RUN) :] == ['python', '-m', 'ilm_jax.main', *RUN]
  assert two == ['scontrol', 'requeue', '7']
  assert plan('slurm.sbatch', *RUN)[0][0] == 'launch/resume.sh', 'without GPUs, JAX is told of none'


def test_slurm_is_asked_for_a_requeue_and_for_a_signal_to_the_processes():
  text = (LAUNCH / 'slurm.sbatch').read_text()
  asked = re.findall(r'^#SBATCH (\S+)$', text, re.M)
  assert {'--requeue', '--ntasks-per-node=1', '--open-mode=append'} <= set(asked)
  (sent,) = [flag for flag in asked if flag.startswith('--signal=')]
  assert sent == '--signal=TERM@120', 'with B: only the script would get it, and without saving'
  assert text.index('#SBATCH') < text.index('set -euo'), 'Slurm reads no further than the first command'


@pytest.fixture
def job(tmp_path):
  """Run slurm.sbatch with stubs for Slurm, as Slurm does: a copy elsewhere, from the folder it was given in."""
  stub(tmp_path / 'bin' / 'srun', f'cd {tmp_path} && exec ./step')
  stub(tmp_path / 'bin' / 'scontrol', f'echo "$@" >> {tmp_path}/requeued')
  shutil.copy(LAUNCH / 'slurm.sbatch', tmp_path / 'slurm_script')
  variables = {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'SLURM_SUBMIT_DIR': small.ROOT, 'SLURM_JOB_ID': 7}
  return lambda **more: running(['bash', tmp_path / 'slurm_script', *RUN], tmp_path, **(variables | more))


@pytest.mark.parametrize(
  ('codes', 'restarted', 'end', 'requeued'),
  [([75], 0, 0, ['requeue 7']), ([75], 100, 75, []), ([1], 0, 1, []), ([0], 0, 0, [])],
)
def test_a_slurm_job_goes_back_to_the_queue_when_it_was_preempted_only(job, tmp_path, codes, restarted, end, requeued):
  (tmp_path / 'codes').write_text('\n'.join(map(str, codes)))
  stub(tmp_path / 'step', ENDS)
  with job(SLURM_RESTART_COUNT=restarted) as process:
    assert process.wait(20) == end
  assert lines(tmp_path / 'requeued') == requeued and len(lines(tmp_path / 'starts')) == 1


def test_a_slurm_job_from_another_folder_says_where_it_belongs(job, tmp_path):
  with job(SLURM_SUBMIT_DIR=tmp_path) as process:
    assert process.wait(10) == 1
  assert lines(tmp_path / 'stderr') == [f"slurm.sbatch: {tmp_path} is not the repository's root: give it from there"]


def test_a_cancelled_slurm_job_stays_out_of_the_queue(job, tmp_path):
  stub(tmp_path / 'step', RUNS)
  with job() as process:
    wait_for(lambda: lines(tmp_path / 'starts'))
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == 75
  assert not lines(tmp_path / 'requeued')


# --- a Cloud TPU ------------------------------------------------------------------------------------------------------

KINDS = {  # as in the vendor's list of software versions
  'v4-8': ('v4-8', 'tpu-ubuntu2204-base'),
  'v4-128': ('v4-128', 'tpu-ubuntu2204-base'),
  'v5e-1': ('v5litepod-1', 'v2-alpha-tpuv5-lite'),
  'v5e-8': ('v5litepod-8', 'v2-alpha-tpuv5-lite'),
  'v5e-256': ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
  'v5p-8': ('v5p-8', 'v2-alpha-tpuv5'),
  'v5p-128': ('v5p-128', 'v2-alpha-tpuv5'),
  'v6e-8': ('v6e-8', 'v2-alpha-tpuv6e'),
  'v6e-256': ('v6e-256', 'v2-alpha-tpuv6e'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_each_type_of_tpu_is_created_by_its_name(kind):
  accelerator, runtime = KINDS[kind]
  gcloud = ['gcloud', 'compute', 'tpus']
  flag = f'--accelerator-type={accelerator}'
  where = '--zone=us-west4-a'
  create = [*gcloud, 'tpu-vm', 'create', 'ilm', where, flag, f'--version={runtime}']
  assert plan('tpu_vm.sh', 'create', *TPU, f'--type={kind}') == [create]
  create, look = plan('tpu_vm.sh', 'create', *TPU, f'--type={kind}', '--queue', '--spot', '--project=p')
  where = [where, '--project=p']
  assert create == [
    *[*gcloud, 'queued-resources', 'create', 'ilm', *where, '--node-id=ilm', '--spot', flag],
    f'--runtime-version={runtime}',
  ]
  assert look == [*gcloud, 'queued-resources', 'describe', 'ilm', *where, '--format=value(state.state)']


def remote(words) -> str:
  """The command that gcloud hands to the hosts."""
  (command,) = [word.removeprefix('--command=') for word in words if word.startswith('--command=')]
  return command


def test_the_flags_of_a_run_reach_the_hosts_as_they_are():
  (words,) = plan('tpu_vm.sh', 'run', *TPU, *RUN, '--max_restarts=3')
  assert words[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh'] and '--worker=all' in words
  inner = shlex.split(remote(words))
  at = inner.index('launch/resume.sh')
  assert inner[at - 1] == 'setsid', 'else it would end with the connection'
  flags = ['--max_restarts=3', '--pause=60', '--result=../ilm_jax.exit', '--']
  command = [*flags, 'env', 'JAX_PLATFORMS=tpu,cpu', '.venv/bin/python', '-m', 'ilm_jax.main', *RUN]
  assert inner[at + 1 : at + 1 + len(command)] == command


def test_the_hosts_get_the_code_and_its_packages():
  bundle, copy, setup = plan('tpu_vm.sh', 'setup', *TPU, TMPDIR='/tmp')
  assert bundle == ['git', 'bundle', 'create', '--quiet', '/tmp/ilm_jax-ilm.bundle', 'HEAD']
  assert copy[3:8] == ['tpu-vm', 'scp', bundle[4], 'ilm:ilm_jax.bundle', TPU[1]] and copy[-1] == '--worker=all'
  assert 'git fetch --quiet ../ilm_jax.bundle HEAD' in remote(setup) and '--worker=all' in setup
  (setup,) = plan('tpu_vm.sh', 'setup', *TPU, '--repo=https://example.com/a b.git', '--ref=v1')
  assert "git fetch --quiet 'https://example.com/a b.git' v1" in remote(setup)
  project = tomllib.loads((small.ROOT / 'pyproject.toml').read_text())['project']
  extras = re.search(r"-e '\.\[(.*)\]'", remote(setup))[1].split(',')
  assert 'tpu' in extras and set(extras) <= set(project['optional-dependencies'])
  python = re.search(r'--python=3\.(\d+) ', remote(setup))[1]
  assert re.fullmatch(r'>=3\.11(\.\d)?', project['requires-python']) and int(python) >= 11


def test_logs_stop_and_delete():
  assert remote(plan('tpu_vm.sh', 'logs', *TPU, '--worker=3')[0]).startswith('tail ')
  assert '--worker=3' in plan('tpu_vm.sh', 'logs', *TPU, '--worker=3')[0]
  (words,) = plan('tpu_vm.sh', 'stop', *TPU)
  assert '--worker=all' in words and remote(words).startswith('kill -TERM ')
  assert plan('tpu_vm.sh', 'delete', *TPU)[0][3:6] == ['tpu-vm', 'delete', 'ilm']
  (words,) = plan('tpu_vm.sh', 'delete', *TPU, '--queue')
  assert words[3:6] == ['queued-resources', 'delete', 'ilm'] and '--force' in words


def test_the_plan_of_train_is_that_of_its_parts():
  kind = ['--type=v5e-8', '--spot', '--queue']
  whole = plan('tpu_vm.sh', 'train', *TPU, *kind, *RUN)
  parts = [('create', kind), ('setup', []), ('run', RUN)]
  first = [words for action, flags in parts for words in plan('tpu_vm.sh', action, *TPU, *flags)]
  assert whole[: len(first)] == first
  assert whole[-1:] == plan('tpu_vm.sh', 'delete', *TPU, '--queue')
  assert plan('tpu_vm.sh', 'train', *TPU, *kind, *RUN, '--keep') == whole[:-1]


# Plays gcloud: the TPU is a folder, what the hosts are told runs there, for real.
CLOUD = """
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
# Plays the Python of a host: makes an environment whose Python is the stub `main`.
PYTHON = '[ "$3" != venv ] || { mkdir -p .venv/bin && cp "$CLOUD/main" .venv/bin/python; }'


@pytest.fixture
def cloud(tmp_path):
  """A checkout with the launchers and a cloud to run them on: call(action, ...) and the calls that gcloud got."""
  stub(tmp_path / 'local' / 'gcloud', CLOUD)
  stub(tmp_path / 'bin' / 'python3', PYTHON)
  checkout = tmp_path / 'checkout'
  shutil.copytree(LAUNCH, checkout / 'launch')
  for words in (['init', '--quiet'], ['add', '.'], ['commit', '--quiet', '--message=launchers']):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.com']
    subprocess.run(['git', *identity, *words], cwd=checkout, check=True, capture_output=True)
  variables = {'PATH': f'{tmp_path}/local:{os.environ["PATH"]}', 'CLOUD': tmp_path, 'TMPDIR': tmp_path}

  def run(main, action, *flags):
    stub(tmp_path / 'main', main)
    return call('tpu_vm.sh', action, *TPU, *flags, folder=checkout / 'launch', **variables)

  return run


SLOW = 'echo "$@" >> "$CLOUD/starts"; sleep 0.5; exit '
TRAIN = ['train', '--type=v5e-8', '--spot', '--poll=0', *RUN]
# Its TPU is taken away at the first start; at the second it finishes.
PREEMPTED = """
echo "$@" >> "$CLOUD/starts"
[ "$(wc -l < "$CLOUD/starts")" -gt 1 ] || { mv "$CLOUD/host" "$CLOUD/gone"; kill -KILL "$PPID"; }
"""


def changes(tmp_path) -> list[str]:
  return [line.split()[-1] for line in lines(tmp_path / 'calls') if line.endswith(('create', 'delete'))]


@pytest.mark.parametrize('queue', [[], ['--queue']])
def test_a_tpu_that_was_preempted_is_made_again_and_deleted_at_the_end(cloud, tmp_path, queue):
  done = cloud(PREEMPTED, *TRAIN, *queue)
  assert done.returncode == 0, done.stderr
  assert lines(tmp_path / 'starts') == [' '.join(['-m', 'ilm_jax.main', *RUN])] * 2
  assert changes(tmp_path) == ['delete', 'create', 'delete', 'create', 'delete'], 'what is left of one goes first'
  kinds = {line.split()[0] for line in lines(tmp_path / 'calls') if line.endswith(('create', 'delete'))}
  assert kinds == {'queued-resources' if queue else 'tpu-vm'}
  assert 'the run was preempted (gone): starting it again (1 of 100)' in done.stderr
  assert done.stderr.splitlines()[-1] == 'tpu_vm.sh: finished' and not (tmp_path / 'host').exists()


def test_nothing_is_made_or_deleted_when_gcloud_does_not_work(cloud, tmp_path):
  (tmp_path / 'states').write_text('ERROR\n')
  done = cloud('exit 0', *TRAIN)
  assert done.returncode == 1 and done.stderr.splitlines() == [
    'error: ERROR: the service is unavailable',
    'tpu_vm.sh: gcloud failed, see above: nothing was made or deleted',
  ]
  assert changes(tmp_path) == []


def test_a_tpu_under_repair_and_a_failing_look_do_not_end_a_run(cloud, tmp_path):
  for action, *flags in (['create', '--type=v5e-8'], ['setup'], ['run', *RUN]):
    assert cloud(SLOW + '0', action, *flags).returncode == 0
  (tmp_path / 'states').write_text('READY\nERROR\nREPAIRING\n')
  done = cloud(SLOW + '0', *TRAIN)
  assert done.returncode == 0 and 'unavailable' in done.stderr and changes(tmp_path) == ['create', 'delete']
  assert len(lines(tmp_path / 'starts')) == 1


def test_a_run_that_fails_shows_its_log_and_costs_no_more(cloud, tmp_path):
  done = cloud('echo "no such config" >&2; exit 1', *TRAIN)
  assert done.returncode == 1 and 'no such config' in done.stdout
  assert 'ended (1)' in done.stderr and changes(tmp_path)[-1] == 'delete' and not (tmp_path / 'host').exists()


def test_a_tpu_that_cannot_be_set_up_is_given_up(cloud, tmp_path):
  done = cloud('', *TRAIN, '--repo=/nowhere')
  assert done.returncode == 1 and changes(tmp_path) == ['delete', 'create', 'delete']
  assert sum(line.endswith('ssh') for line in lines(tmp_path / 'calls')) >= 3, 'it is tried again first'


def test_a_tpu_can_be_kept(cloud, tmp_path):
  done = cloud('exit 0', *TRAIN, '--keep')
  assert done.returncode == 0 and 'kept, and costs' in done.stderr and changes(tmp_path) == ['delete', 'create']


def test_train_follows_a_run_to_its_end(cloud, tmp_path):
  for action, *flags in (['create', '--type=v5e-8'], ['setup'], ['run', *RUN]):
    assert cloud(SLOW + '0', action, *flags).returncode == 0
  done = cloud(SLOW + '0', *TRAIN)
  assert done.returncode == 0 and len(lines(tmp_path / 'starts')) == 1
  assert changes(tmp_path) == ['create', 'delete']


def test_the_end_of_an_earlier_run_is_not_taken_for_that_of_this_one(cloud, tmp_path):
  assert cloud(SLOW + '0', *TRAIN, '--keep').returncode == 0
  assert cloud(SLOW + '1', *TRAIN).returncode == 1
  assert len(lines(tmp_path / 'starts')) == 2


def children(pid) -> list[list[str]]:
  """The commands of the processes that this one has started."""
  found = []
  for child in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
    with contextlib.suppress(OSError):  # it may have ended
      found.append(pathlib.Path(f'/proc/{child}/cmdline').read_text().split('\0')[:-1])
  return found


def test_a_ctrl_c_leaves_the_run_and_the_tpu_alone(cloud, tmp_path):
  """And `train` follows it again: nothing is set up or started twice."""
  assert cloud(RUNS, 'create', '--type=v5e-8').returncode == 0
  script = tmp_path / 'checkout' / 'launch' / 'tpu_vm.sh'
  variables = {'PATH': f'{tmp_path}/local:{os.environ["PATH"]}', 'CLOUD': tmp_path, 'TMPDIR': tmp_path}
  command = ['bash', script, TRAIN[0], *TPU, *TRAIN[1:], '--poll=30']
  for _ in range(2):
    with running(command, tmp_path, **variables) as process:
      # As it does nearly always: bash can miss a signal that comes while it starts a command.
      wait_for(lambda process=process: ['sleep', '30'] in children(process.pid))
      os.killpg(process.pid, signal.SIGINT)
      assert process.wait(10) == 130
    assert 'the run goes on, and the TPU costs' in (tmp_path / 'stderr').read_text()
  wait_for(lambda: lines(tmp_path / 'host' / 'ilm_jax' / 'starts'))
  assert len(lines(tmp_path / 'host' / 'ilm_jax' / 'starts')) == 1 and changes(tmp_path) == ['create']
  assert sum(line.endswith('scp') for line in lines(tmp_path / 'calls')) == 1
  assert cloud(RUNS, 'stop').returncode == 0
  wait_for(lambda: lines(tmp_path / 'host' / 'ilm_jax.exit'))


def test_one_run_at_a_time_and_stop_saves_it(cloud, tmp_path):
  for action, *flags in (['create', '--type=v5e-8'], ['setup'], ['run', *RUN]):
    done = cloud(RUNS, action, *flags)
    assert done.returncode == 0, done.stderr
  wait_for(lambda: lines(tmp_path / 'host' / 'ilm_jax' / 'starts'))
  again = cloud(RUNS, 'run', *RUN)
  assert again.returncode == 1 and 'a run is going on: stop it first' in again.stderr
  time.sleep(0.1)
  assert cloud(RUNS, 'stop').returncode == 0
  wait_for(lambda: lines(tmp_path / 'host' / 'ilm_jax.exit'))
  assert lines(tmp_path / 'host' / 'ilm_jax.exit') == ['75']
  assert lines(tmp_path / 'host' / 'ilm_jax' / 'got') == ['TERM']
  assert 'told to stop' in (tmp_path / 'host' / 'ilm_jax.log').read_text()


# --- GKE --------------------------------------------------------------------------------------------------------------


def manifest(name) -> tuple[dict, dict, dict, dict]:
  """A JobSet, its only group of jobs, their spec, and their container."""
  (jobset,) = yaml.safe_load_all((LAUNCH / name).read_text())
  (group,) = jobset['spec']['replicatedJobs']
  spec = group['template']['spec']
  (container,) = spec['template']['spec']['containers']
  return jobset, group, spec, container


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_jobset_restarts_all_but_errors(name):
  jobset, group, spec, container = manifest(name)
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  for label in (jobset['metadata']['name'], group['name'], container['name']):
    assert re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', label)
  assert set(jobset['spec']) == {'failurePolicy', 'replicatedJobs'}
  assert set(group) == {'name', 'replicas', 'template'} and set(group['template']) == {'spec'}
  policy = jobset['spec']['failurePolicy']
  assert set(policy) == {'maxRestarts', 'restartStrategy', 'rules'} and policy['maxRestarts'] == 100
  (rule,) = policy['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  assert re.fullmatch(r'[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
  # A job is one try; whether there is another is up to the JobSet, which restarts all of them.
  assert spec['backoffLimit'] == 0 and spec['template']['spec']['restartPolicy'] == 'Never'
  (fails,) = spec['podFailurePolicy']['rules']
  assert fails['action'] == 'FailJob' and fails['onExitCodes']['operator'] == 'In'
  assert fails['onExitCodes']['containerName'] == container['name']
  codes = fails['onExitCodes']['values']
  assert {1, 130} <= set(codes) and not {75, 134, 137, 139, 143} & set(codes)
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism']
  assert [word.split('=')[0] for word in container['args'][:2]] == ['--config', '--workdir']
  assert (small.ROOT / container['args'][0].split('=')[1].split(':')[0]).exists()
  assert container['args'][1].startswith('--workdir=gs://')


@pytest.mark.parametrize('name', MANIFESTS)
def test_the_jobs_of_a_jobset_fit_their_schema(name):
  _, group, _, _ = manifest(name)
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'a'}, **group['template']}
  kubernetes_validate.validate(job, '1.31', strict=True)  # raises
  job['spec']['completionsMode'] = 'Indexed'
  with pytest.raises(kubernetes_validate.ValidationError, match='completionsMode'):
    kubernetes_validate.validate(job, '1.31', strict=True)


def test_the_tpu_jobset_has_as_many_hosts_as_its_slice():
  _, _, spec, container = manifest('gke_jobset.yaml')
  selector = spec['template']['spec']['nodeSelector']
  chips = math.prod(map(int, selector['cloud.google.com/gke-tpu-topology'].split('x')))
  assert selector['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v5-lite-podslice'
  assert chips == spec['parallelism'] * container['resources']['limits']['google.com/tpu'] == 8
  assert container['env'] == [{'name': 'JAX_PLATFORMS', 'value': 'tpu,cpu'}]


def test_the_hosts_of_the_gpu_jobset_find_each_other():
  jobset, group, spec, container = manifest('gke_jobset_gpu.yaml')
  flags = dict(word[2:].split('=', 1) for word in container['args'])
  name = jobset['metadata']['name']
  host, port = flags['coordinator'].split(':')
  assert host == f'{name}-{group["name"]}-0-0.{name}' and int(port) > 1024
  assert int(flags['num_processes']) == spec['completions'] * group['replicas'] > 1
  assert flags['process_id'] == '$(JOB_COMPLETION_INDEX)'
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  env = {one['name']: one['value'] for one in container['env']}
  assert env == {'JAX_PLATFORMS': 'cuda,cpu', 'LD_LIBRARY_PATH': '/usr/local/nvidia/lib64'}


def test_the_image_runs_main_with_extras_that_exist():
  text = (small.ROOT / 'Dockerfile').read_text()
  extras = tomllib.loads((small.ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  named = [set(words.split(',')) for words in re.findall(r'\bEXTRAS=(\S+)', text)]
  assert len(named) == 2 and all('gcs' in words and words <= set(extras) for words in named)
  assert 'ENTRYPOINT ["python", "-m", "ilm_jax.main"]' in text
  for name in re.search(r'^COPY (.*) \./$', text, re.M)[1].split():
    assert (small.ROOT / name).exists()


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_launchers_take_the_commands_of_the_readme():
  text = (LAUNCH / 'README.md').read_text()
  blocks = [block.replace('\\\n', ' ') for block in re.findall(r'```sh\n(.*?)```', text, re.S)]
  taken = {}
  for line in (line.strip() for block in blocks for line in block.splitlines()):
    if at := re.match(r'(?:sbatch .*?)?launch/(\S+\.(?:sh|sbatch))', line):
      words = [re.sub(r'\$\w+', 'x', word) for word in shlex.split(line[at.end() :], comments=True)]
      words.insert(at[1] == 'tpu_vm.sh', '--dry_run')
      done = call(at[1], *words)
      assert done.returncode == 0 and done.stdout, (line, done.stderr)
      taken[at[1]] = taken.get(at[1], 0) + 1
  assert set(taken) == {'resume.sh', 'tpu_vm.sh', 'gpu.sh', 'slurm.sbatch', 'fits.sh'} and taken['tpu_vm.sh'] > 9


def test_the_table_of_what_fits_has_the_rows_that_are_compiled():
  compiled = []
  for words in plan('fits.sh'):
    flags = dict(word.removeprefix('--').split('=', 1) for word in words if '=' in word)
    sizes = {axis: int(flags.get(f'config.mesh.{axis}', 1)) for axis in ('data', 'fsdp', 'tensor')}
    rows, chips = int(flags['config.data.rows']), math.prod(map(int, flags['topology'].split(':')[1].split('x')))
    assert math.prod(sizes.values()) == chips and rows % (sizes['data'] * sizes['fsdp']) == 0
    assert rows % int(flags['config.data.groups']) == 0
    mesh = ', '.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1)
    remat = {'True': 'yes', 'False': 'no'}[flags['config.model.remat']]
    compiled.append((flags['config.model.preset'], flags['topology'], mesh, str(rows), remat))
  table = (LAUNCH / 'README.md').read_text().split('| model | slice |')[1]
  told = re.findall(r'^\| (\w+) \| `(\S+)` \| (.*?) \| (\d+) \| (yes|no) \|', table, re.M)
  assert [(model.lower(), *rest) for model, *rest in told] == compiled and len(compiled) == 13


def test_the_readme_names_the_types_as_gcloud_does():
  text = (LAUNCH / 'README.md').read_text()
  rows = re.findall(r'^\| `(\w+)-N` \| .* \| `(\w+)-N` \| `(\S+)` \|$', text, re.M)
  known = {(kind.split('-')[0], accelerator.split('-')[0], runtime) for kind, (accelerator, runtime) in KINDS.items()}
  assert set(rows) == known
