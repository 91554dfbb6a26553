"""Restarts and signal handling by resume.sh, gpu.sh and slurm.sbatch, with fake commands instead of training."""

import os
import shutil
import signal
import time

import launch_helpers as launch
import pytest


@pytest.fixture
def resume(tmp_path):
  """Return a function that runs resume.sh on a command that ends with `codes` in turn -> (result, number of starts)."""

  def run(codes, *flags, command=None, **variables):
    (tmp_path / 'codes').write_text('\n'.join(map(str, codes)))
    command = command or [launch.write_program(tmp_path / 'command', launch.END_WITH_NEXT_CODE)]
    done = launch.call('resume.sh', '--pause=0', '--result=result', *flags, '--', *command, cwd=tmp_path, **variables)
    assert launch.lines(tmp_path / 'result') == [str(done.returncode)]
    return done, len(launch.lines(tmp_path / 'starts'))

  return run


def test_a_preempted_run_is_restarted_until_it_finishes(resume):
  done, starts = resume([75, 75, 0])
  assert (done.returncode, starts) == (0, 3)
  assert done.stderr.splitlines() == [
    f'resume.sh: exit code 75: preempted, state saved; restarting in 0 s (restart {i} of 100)' for i in (1, 2)
  ]


@pytest.mark.parametrize(('code', 'reason'), [(1, 'error'), (130, 'Ctrl-C'), (141, 'closed the pipe'), (253, 'error')])
def test_resume_sh_does_not_restart_after_an_error_or_ctrl_c(resume, code, reason):
  done, starts = resume([], command=['sh', '-c', f'echo start >> starts; exit {code}'])
  assert (done.returncode, starts) == (code, 1)
  assert reason in done.stderr and 'not restarting' in done.stderr and done.stderr.count('\n') == 1


def test_a_killed_run_is_restarted_and_the_log_names_the_cause(resume):
  causes = {134: 'another process', 135: 'signal 7', 137: 'out of memory', 139: 'segmentation fault'}
  done, starts = resume([*causes, 0])
  assert (done.returncode, starts) == (0, 5)
  for line, (code, cause) in zip(done.stderr.splitlines(), causes.items(), strict=True):
    assert f'exit code {code}: ' in line and cause in line and 'restarting in 0 s' in line


def test_resume_sh_does_not_restart_a_command_that_ends_with_the_stop_on_exit_code(resume):
  done, starts = resume([143, 75, 0], '--stop_on=75')
  assert (done.returncode, starts) == (75, 2)
  assert 'exit code 143: killed by SIGTERM before it could save; restarting' in done.stderr


def test_resume_sh_gives_up_after_max_restarts(resume):
  done, starts = resume([75] * 9, '--max_restarts=2')
  assert (done.returncode, starts) == (75, 3)
  assert 'the limit of 2 restarts is reached (--max_restarts)' in done.stderr.splitlines()[-1]


def test_resume_sh_gives_up_after_five_early_exits_in_a_row(resume, tmp_path):
  """The fourth run seems to last two minutes (a trap changes bash's SECONDS), which resets the count of early exits."""
  clock = tmp_path / 'clock'
  clock.write_text(
    """trap '[ "$BASH_COMMAND" != wait_for_child ] || [ "${restarts:-}" != 3 ] || SECONDS=$((SECONDS + 120))' DEBUG"""
  )
  done, starts = resume([134] * 12, BASH_ENV=clock)
  assert (done.returncode, starts) == (134, 4 + 5), done.stderr
  assert 'within a minute of its start 5 times in a row' in done.stderr.splitlines()[-1]


def test_resume_sh_passes_arguments_to_the_command_unchanged(resume, tmp_path):
  command = [launch.write_program(tmp_path / 'command', 'printf "%s\\n" "$@" > arguments'), *launch.AWKWARD]
  done, _ = resume([], command=command)
  assert done.returncode == 0 and launch.lines(tmp_path / 'arguments') == launch.AWKWARD


@pytest.mark.parametrize(('sent', 'forwarded', 'code'), [('HUP', 'TERM', 75), ('INT', 'INT', 130)])
def test_resume_sh_forwards_a_signal_once_and_does_not_restart(tmp_path, sent, forwarded, code):
  script = launch.write_program(tmp_path / 'command', launch.RUN_UNTIL_SIGNAL)
  with launch.running(['bash', launch.FOLDER / 'resume.sh', '--pause=0', '--', script], tmp_path) as process:
    launch.wait_for_start(tmp_path)
    os.killpg(process.pid, signal.Signals[f'SIG{sent}'])  # as a terminal does: signal the whole process group
    assert process.wait(10) == code
  assert launch.lines(tmp_path / 'received') == [forwarded] and len(launch.lines(tmp_path / 'starts')) == 1
  assert 'stopped by a signal; ' in (tmp_path / 'stderr').read_text()


def test_a_suspended_command_is_not_restarted_and_still_receives_signals(tmp_path):
  script = launch.write_program(tmp_path / 'command', f'echo $$ > pid\n{launch.RUN_UNTIL_SIGNAL}')
  with launch.running(['bash', launch.FOLDER / 'resume.sh', '--pause=0', '--', script], tmp_path) as process:
    launch.wait_for_start(tmp_path)
    pid = int(launch.lines(tmp_path / 'pid')[0])
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.1)
    process.terminate()
    assert process.wait(10) == 75
  assert launch.lines(tmp_path / 'received') == ['TERM'] and len(launch.lines(tmp_path / 'starts')) == 1


def test_a_signal_ends_the_pause_before_a_restart(tmp_path):
  (tmp_path / 'codes').write_text('75\n0\n')
  script = launch.write_program(tmp_path / 'command', launch.END_WITH_NEXT_CODE)
  with launch.running(['bash', launch.FOLDER / 'resume.sh', '--pause=50', '--', script], tmp_path) as process:
    launch.wait_for(lambda: 'restarting' in (tmp_path / 'stderr').read_text())
    time.sleep(0.1)
    process.terminate()
    assert process.wait(10) == 75
  assert len(launch.lines(tmp_path / 'starts')) == 1


def test_gpu_sh_forwards_a_signal_to_the_training_run(tmp_path):
  """gpu.sh replaces itself with resume.sh (by exec), which forwards the signal."""
  python = launch.write_program(tmp_path / 'python', f'cd {tmp_path}\n{launch.RUN_UNTIL_SIGNAL}')
  with launch.running(['bash', launch.FOLDER / 'gpu.sh', *launch.RUN], tmp_path, PYTHON=python) as process:
    launch.wait_for_start(tmp_path)
    process.terminate()
    assert process.wait(10) == 75
  assert launch.lines(tmp_path / 'received') == ['TERM']


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm_job(tmp_path):
  """Return a function that runs a copy of slurm.sbatch in the folder where the job was submitted, as Slurm does."""
  launch.write_program(tmp_path / 'bin' / 'srun', f'cd {tmp_path} && exec ./step')
  launch.write_program(tmp_path / 'bin' / 'scontrol', f'echo "$@" >> {tmp_path}/requeued')
  shutil.copy(launch.FOLDER / 'slurm.sbatch', tmp_path / 'slurm_script')
  variables = {'PATH': launch.path_with(tmp_path / 'bin'), 'SLURM_SUBMIT_DIR': launch.ROOT, 'SLURM_JOB_ID': 7}
  return lambda **more: launch.running(['bash', tmp_path / 'slurm_script', *launch.RUN], tmp_path, **(variables | more))


@pytest.mark.parametrize(
  ('code', 'restart_count', 'job_code', 'requeued'),
  [(75, 0, 0, ['requeue 7']), (75, 100, 75, []), (1, 0, 1, []), (0, 0, 0, [])],
)
def test_only_a_preempted_slurm_job_is_requeued(slurm_job, tmp_path, code, restart_count, job_code, requeued):
  (tmp_path / 'codes').write_text(str(code))
  launch.write_program(tmp_path / 'step', launch.END_WITH_NEXT_CODE)
  with slurm_job(SLURM_RESTART_COUNT=restart_count) as process:
    assert process.wait(20) == job_code
  assert launch.lines(tmp_path / 'requeued') == requeued and len(launch.lines(tmp_path / 'starts')) == 1


def test_a_slurm_job_must_be_submitted_in_the_root_of_the_repository(slurm_job, tmp_path):
  with slurm_job(SLURM_SUBMIT_DIR=tmp_path) as process:
    assert process.wait(10) == 1
  message = f'slurm.sbatch: {tmp_path} is not the root of the repository: run sbatch there'
  assert launch.lines(tmp_path / 'stderr') == [message]


def test_a_cancelled_slurm_job_is_not_requeued(slurm_job, tmp_path):
  launch.write_program(tmp_path / 'step', launch.RUN_UNTIL_SIGNAL)
  with slurm_job() as process:
    launch.wait_for_start(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == 75
  assert not launch.lines(tmp_path / 'requeued')
