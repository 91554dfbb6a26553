"""Test helpers for the launch scripts: run a script, parse its dry run, and replace programs with fakes."""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'launch'
# Flags that need quoting in a shell command.
AWKWARD = ["--config.task.label=it's a b, $HOME", '--config.task.names=x,y', '--config.eval.note=']
RUN = ['--config=configs/star.py:hard', '--workdir=gs://bucket/hard', *AWKWARD]
TPU = ['--name=ilm', '--zone=us-west4-a']

# A command that logs its start and exits with the next code in the file `codes`; for 128 + n, it dies of signal n.
END_WITH_NEXT_CODE = """
ulimit -c 0
echo start >> starts
code=$(head -n 1 codes); sed -i 1d codes
[ "$code" -lt 128 ] || kill -$((code - 128)) $$
exit "$code"
"""
# A command that runs until SIGTERM or SIGINT, logs the signal in the file `received` and exits as a training run does.
RUN_UNTIL_SIGNAL = """
trap 'echo TERM >> received; exit 75' TERM
trap 'echo INT >> received; exit 130' INT
echo start >> starts
for _ in $(seq 1500); do sleep 0.02; done
"""


def environment(**variables) -> dict[str, str]:
  """Return the environment variables of the test process, except PYTHON and SLURM_*, plus `variables`."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_') and k != 'PYTHON'}
  return inherited | {k: str(v) for k, v in variables.items()}


def path_with(folder) -> str:
  """Return PATH with a folder prepended, so that the programs in this folder take precedence."""
  return f'{folder}:{os.environ["PATH"]}'


def call(script, *arguments, folder=FOLDER, cwd=None, **variables) -> subprocess.CompletedProcess:
  """Run a launch script with arguments and environment variables, by default from the repository root."""
  return subprocess.run(
    ['bash', folder / script, *arguments],
    env=environment(**variables),
    cwd=cwd or folder.parent,
    stdin=subprocess.DEVNULL,
    timeout=60,
    capture_output=True,
    text=True,
  )


def dry_run(script, *arguments, **variables) -> list[list[str]]:
  """Return the arguments of each command that a dry run prints."""
  done = call(script, *arguments, '--dry_run', **variables)
  assert done.returncode == 0, done.stderr
  return [words for line in done.stdout.splitlines() if (words := shlex.split(line, comments=True))]


def write_program(path: pathlib.Path, text: str) -> pathlib.Path:
  """Write an executable bash script; returns its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)
  return path


def lines(path) -> list[str]:
  """Return the lines of a file, or an empty list if it does not exist."""
  return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=10.0):
  """Wait until condition() is true; fail after `seconds`."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'the condition did not become true in time'
    time.sleep(0.02)


def wait_for_start(folder):
  """Wait until the fake command in a folder has started and resume.sh waits for it."""
  wait_for(lambda: lines(folder / 'starts'))
  time.sleep(0.1)


def restore_signals():
  """Restore default signal handlers: bash cannot trap a signal that its parent ignores, for example under nohup."""
  for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def running(command, folder, **variables):
  """Context manager: run a command in its own session, with stderr in the file `stderr`, and kill it at the end."""
  with open(folder / 'stderr', 'w') as stderr:
    process = subprocess.Popen(
      command, cwd=folder, stderr=stderr, env=environment(**variables), start_new_session=True,
      preexec_fn=restore_signals,
    )  # fmt: skip
  try:
    yield process
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()
