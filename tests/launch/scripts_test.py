"""All launch scripts: shellcheck, help texts, error messages and dry runs; commands and tables of launch/README.md."""

import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from launch_helpers import FOLDER, ROOT, RUN, TPU, call, dry_run, lines, path_with, write_program

SCRIPTS = ['resume.sh', 'gpu.sh', 'tpu_vm.sh', 'slurm.sbatch', 'fits.sh', 'table.sh']
TPU_TYPES = {  # --type of tpu_vm.sh -> accelerator type and runtime version in Google's documentation
  'v4-8': ('v4-8', 'tpu-ubuntu2204-base'),
  'v5e-256': ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
  'v5p-128': ('v5p-128', 'v2-alpha-tpuv5'),
  'v6e-8': ('v6e-8', 'v2-alpha-tpuv6e'),
}


def test_shellcheck_finds_no_problem_in_the_launch_scripts():
  tool = shutil.which('shellcheck') or shutil.which('shellcheck', path=pathlib.Path(sys.executable).parent)
  if tool is None:
    pytest.skip('shellcheck is not installed')
  files = [f'launch/{name}' for name in ('common.sh', *SCRIPTS)]
  done = subprocess.run([tool, '-x', *files], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_the_header_of_every_launch_file_says_when_it_was_last_run_or_built():
  for name in [*SCRIPTS, 'gke_jobset.yaml', 'gke_jobset_gpu.yaml', '../Dockerfile']:
    header = re.match(r'(#.*\n)+', (FOLDER / name).read_text())[0]
    assert re.search(r'^# Last real (run|build): \S+', header, re.M), name


def test_help_prints_the_header_comment_of_the_launch_script():
  for name in SCRIPTS:
    done = call(name, '--help')
    assert done.returncode == 0 and not done.stderr
    assert f'launch/{name}' in done.stdout and 'Last real run' in done.stdout
    assert not re.search(r'^#', done.stdout, re.M) and 'pipefail' not in done.stdout


def test_a_dry_run_executes_no_command(tmp_path):
  for name in ['gcloud', 'git', 'make', 'srun', 'scontrol', 'env', 'python']:
    write_program(tmp_path / 'bin' / name, f'[ "$1" = diff ] || echo {name} >> {tmp_path}/ran')
  path = path_with(tmp_path / 'bin')
  dry_run('gpu.sh', *RUN, PATH=path)
  dry_run('slurm.sbatch', *RUN, PATH=path, SLURM_GPUS_ON_NODE=8)
  dry_run('tpu_vm.sh', 'train', *TPU, '--type=v5e-8', '--queue', *RUN, PATH=path)
  dry_run('fits.sh', PATH=path)
  assert call('resume.sh', '--dry_run', '--', 'python', 'a b', PATH=path).stdout == "python 'a b'\n"
  assert lines(tmp_path / 'ran') == []


MISTAKES = [  # script, arguments, start of the error message
  ('resume.sh', ['--'], 'the command is missing'),
  ('resume.sh', ['python'], 'python: unknown flag; expected --max_restarts='),
  ('resume.sh', ['--pause=', '--', 'true'], '--pause=: expected a whole number'),
  ('fits.sh', ['--topology=v5e:4x4'], '--topology=v5e:4x4: expected v5e:2x4, v5e:16x16,'),
  ('gpu.sh', ['--workdir=runs/x'], '--config is missing'),
  ('gpu.sh', ['--config', 'configs/star.py'], '--config: unknown flag'),
  ('gpu.sh', [*RUN, '--max_restarts=-1'], '--max_restarts=-1: expected a whole number'),
  ('slurm.sbatch', ['--workdir=/shared/x'], '--config is missing'),
  ('slurm.sbatch', ['--config=configs/star.py'], '--workdir is missing'),
  ('slurm.sbatch', [*RUN, '--nodes=2'], '--nodes=2: unknown flag'),
  ('table.sh', [], 'no config: expected configs, such as'),
  ('table.sh', ['--seeds=3', 'star.py:tiny'], '--seeds=3: expected configs'),
  ('tpu_vm.sh', [], 'no action: expected train, create, setup, run, logs, stop or delete'),
  ('tpu_vm.sh', ['start', *TPU], 'start: expected train,'),
  ('tpu_vm.sh', ['delete', '--zone=z'], '--name is missing'),
  ('tpu_vm.sh', ['delete', '--name=n'], '--zone is missing'),
  ('tpu_vm.sh', ['create', *TPU], '--type is missing'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e'], '--type=v5e: unknown TPU type; expected v4-N, v5e-N, v5p-N or v6e-N'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e-12'], '--type=v5e-12: expected one of 1 4 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v4-4'], '--type=v4-4: expected a multiple of 8'),
  ('tpu_vm.sh', ['create', *TPU, '--type=v5e-8', '--sopt'], '--sopt: unknown flag'),
  ('tpu_vm.sh', ['logs', *TPU, '--worker=all'], '--worker=all: expected a whole number'),
  ('tpu_vm.sh', ['run', *TPU, '--workdir=gs://b/x'], '--config is missing'),
  ('tpu_vm.sh', ['run', *TPU, RUN[0]], '--workdir=: expected gs://BUCKET/FOLDER'),
  ('tpu_vm.sh', ['train', *TPU, '--type=v5e-8', RUN[0], '--workdir=runs/x'], '--workdir=runs/x: expected gs://'),
]


def test_a_wrong_launcher_flag_gives_a_one_line_error(tmp_path):
  write_program(tmp_path / 'gcloud', 'echo called >&2')
  for script, arguments, message in MISTAKES:
    done = call(script, *arguments, PATH=path_with(tmp_path))
    assert done.returncode == 1 and not done.stdout, (script, arguments)
    assert done.stderr.startswith(f'{script}: {message}') and done.stderr.count('\n') == 1, (script, arguments)


def test_gpu_sh_installs_cuda_and_trains_under_resume_sh():
  train = ['.venv/bin/python', '-m', 'ilm_jax.main', *RUN]
  resume = ['env', 'JAX_PLATFORMS=cuda,cpu', 'launch/resume.sh', '--max_restarts=7', '--pause=10', '--']
  assert dry_run('gpu.sh', *RUN, '--max_restarts=7') == [['make', 'setup', 'EXTRAS=cuda'], [*resume, *train]]
  assert dry_run('gpu.sh', *RUN, PYTHON='/opt/my python')[0][6:] == ['/opt/my python', *train[1:]]
  processes = ['--coordinator=10.0.0.1:8476', '--num_processes=2', '--process_id=1']
  command = dry_run('gpu.sh', *RUN, *processes)[-1]
  assert command[-3:] == processes and '--pause=60' in command, 'the other processes must first notice the lost one'


def test_slurm_sbatch_runs_one_process_per_node_and_requeues():
  train, requeue = dry_run('slurm.sbatch', *RUN, SLURM_GPUS_ON_NODE=4, SLURM_JOB_ID=7, PYTHON='python')
  srun = train.index('srun')
  assert train[:srun] == [
    *['env', 'JAX_LOCAL_DEVICE_IDS=0,1,2,3', 'JAX_PLATFORMS=cuda,cpu'],
    *['launch/resume.sh', '--max_restarts=100', '--stop_on=75', '--'],
  ]
  assert {'--ntasks-per-node=1', '--kill-on-bad-exit=0'} <= set(train[srun:])
  assert train[-3 - len(RUN) :] == ['python', '-m', 'ilm_jax.main', *RUN]
  assert requeue == ['scontrol', 'requeue', '7']
  assert dry_run('slurm.sbatch', *RUN)[0][0] == 'launch/resume.sh', 'JAX_LOCAL_DEVICE_IDS is only for GPUs'


def test_slurm_sbatch_requests_sigterm_for_the_processes_before_the_time_limit():
  text = (FOLDER / 'slurm.sbatch').read_text()
  options = re.findall(r'^#SBATCH (\S+)$', text, re.M)
  assert {'--requeue', '--ntasks-per-node=1', '--open-mode=append'} <= set(options)
  signals = [option for option in options if option.startswith('--signal=')]
  assert signals == ['--signal=TERM@120'], 'B:TERM would signal only the script, and the processes would not save'
  assert text.index('#SBATCH') < text.index('set -euo'), 'Slurm ignores #SBATCH options after the first command'


# --- launch/README.md -------------------------------------------------------------------------------------------------


def test_the_launch_scripts_accept_the_commands_of_their_readme():
  text = (FOLDER / 'README.md').read_text()
  blocks = [block.replace('\\\n', ' ') for block in re.findall(r'```sh\n(.*?)```', text, re.S)]
  accepted = []
  for line in (line.strip() for block in blocks for line in block.splitlines()):
    if match := re.match(r'(?:sbatch .*?)?launch/(\S+\.(?:sh|sbatch))', line):
      arguments = [re.sub(r'\$\w+', 'x', word) for word in shlex.split(line[match.end() :], comments=True)]
      arguments.insert(match[1] == 'tpu_vm.sh', '--dry_run')
      done = call(match[1], *arguments)
      assert done.returncode == 0 and done.stdout, (line, done.stderr)
      accepted.append(match[1])
  assert set(accepted) == set(SCRIPTS) - {'table.sh'} and accepted.count('tpu_vm.sh') > 9


def test_fits_sh_compiles_the_models_of_the_table_in_the_readme():
  compiled = []
  for command in dry_run('fits.sh'):
    flags = dict(word.removeprefix('--').split('=', 1) for word in command if '=' in word)
    sizes = {axis: int(flags.get(f'config.mesh.{axis}', 1)) for axis in ('data', 'fsdp', 'tensor')}
    rows, chips = int(flags['config.data.rows']), math.prod(map(int, flags['topology'].split(':')[1].split('x')))
    assert math.prod(sizes.values()) == chips and rows % (sizes['data'] * sizes['fsdp']) == 0
    assert rows % int(flags['config.data.groups']) == 0
    mesh = ', '.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1)
    remat = {'True': 'yes', 'False': 'no'}[flags['config.model.remat']]
    compiled.append((flags['config.model.preset'], flags['topology'], mesh, str(rows), remat))
  table = (FOLDER / 'README.md').read_text().split('| model | slice |')[1]
  rows = re.findall(r'^\| (\w+) \| `(\S+)` \| (.*?) \| (\d+) \| (yes|no) \|', table, re.M)
  assert [(model.lower(), *rest) for model, *rest in rows] == compiled and len(compiled) == 13


def test_tpu_vm_sh_and_the_readme_agree_on_the_gcloud_names_of_tpu_types():
  gcloud = ['gcloud', 'compute', 'tpus']
  for kind, (accelerator, runtime) in TPU_TYPES.items():
    zone, flag = '--zone=us-west4-a', f'--accelerator-type={accelerator}'
    create = [*gcloud, 'tpu-vm', 'create', 'ilm', zone, flag, f'--version={runtime}']
    assert dry_run('tpu_vm.sh', 'create', *TPU, f'--type={kind}') == [create]
  text = (FOLDER / 'README.md').read_text()
  rows = re.findall(r'^\| `(\w+)-N` \| .* \| `(\w+)-N` \| `(\S+)` \|$', text, re.M)
  expected = {(kind.split('-')[0], names[0].split('-')[0], names[1]) for kind, names in TPU_TYPES.items()}
  assert set(rows) == expected


def test_the_dockerfile_installs_only_existing_extras_and_copies_existing_files():
  text = (ROOT / 'Dockerfile').read_text()
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  used = [set(words.split(',')) for words in re.findall(r'\bEXTRAS=(\S+)', text)]
  assert len(used) == 2 and all('gcs' in words and words <= set(extras) for words in used)
  assert 'ENTRYPOINT ["python", "-m", "ilm_jax.main"]' in text
  for name in re.search(r'^COPY (.*) \./$', text, re.M)[1].split():
    assert (ROOT / name).exists()
