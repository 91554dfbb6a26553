"""The JobSet manifests for GKE: restart rules, Kubernetes schema, and numbers of hosts and chips."""

import math
import re

import kubernetes_validate
import pytest
import yaml
from launch_helpers import FOLDER, ROOT

MANIFESTS = ['gke_jobset.yaml', 'gke_jobset_gpu.yaml']


def load_manifest(name) -> tuple[dict, dict, dict, dict]:
  """Load a JobSet manifest; return (JobSet, its replicated job, spec of that job, its container)."""
  (jobset,) = yaml.safe_load_all((FOLDER / name).read_text())
  (replicated,) = jobset['spec']['replicatedJobs']
  spec = replicated['template']['spec']
  (container,) = spec['template']['spec']['containers']
  return jobset, replicated, spec, container


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_jobset_restarts_a_failed_run_unless_its_exit_code_is_1_2_or_130(name):
  jobset, replicated, spec, container = load_manifest(name)
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  for label in (jobset['metadata']['name'], replicated['name'], container['name']):
    assert re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', label)
  rule = {'name': 'anError', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  policy = {'maxRestarts': 100, 'restartStrategy': 'BlockingRecreate', 'rules': [rule]}
  assert set(jobset['spec']) == {'failurePolicy', 'replicatedJobs'} and jobset['spec']['failurePolicy'] == policy
  assert set(replicated) == {'name', 'replicas', 'template'} and set(replicated['template']) == {'spec'}
  # A failed pod fails its job immediately; the JobSet then decides whether to restart, and restarts all jobs.
  assert spec['backoffLimit'] == 0 and spec['template']['spec']['restartPolicy'] == 'Never'
  # Other exit codes restart the run: 75 (preempted) and 128 + n (killed by signal n).
  errors = {'containerName': container['name'], 'operator': 'In', 'values': [1, 2, 130]}
  assert spec['podFailurePolicy'] == {'rules': [{'action': 'FailJob', 'onExitCodes': errors}]}
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism']
  config, workdir = container['args'][:2]
  assert (ROOT / config.removeprefix('--config=').split(':')[0]).is_file() and workdir.startswith('--workdir=gs://')


def test_the_jobs_in_the_manifests_match_the_kubernetes_schema():
  for name in MANIFESTS:
    template = load_manifest(name)[1]['template']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'a'}, **template}
    kubernetes_validate.validate(job, '1.31', strict=True)


def test_the_tpu_jobset_requests_all_chips_of_its_slice():
  _, _, spec, container = load_manifest('gke_jobset.yaml')
  selector = spec['template']['spec']['nodeSelector']
  chips = math.prod(map(int, selector['cloud.google.com/gke-tpu-topology'].split('x')))
  assert selector['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v5-lite-podslice'
  assert chips == spec['parallelism'] * container['resources']['limits']['google.com/tpu'] == 8
  assert container['env'] == [{'name': 'JAX_PLATFORMS', 'value': 'tpu,cpu'}]


def test_the_coordinator_of_the_gpu_jobset_is_its_first_pod():
  jobset, replicated, spec, container = load_manifest('gke_jobset_gpu.yaml')
  flags = dict(word[2:].split('=', 1) for word in container['args'])
  name = jobset['metadata']['name']
  host, port = flags['coordinator'].split(':')
  assert host == f'{name}-{replicated["name"]}-0-0.{name}' and int(port) > 1024
  assert int(flags['num_processes']) == spec['completions'] * replicated['replicas'] > 1
  assert flags['process_id'] == '$(JOB_COMPLETION_INDEX)'
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  env = {one['name']: one['value'] for one in container['env']}
  assert env == {'JAX_PLATFORMS': 'cuda,cpu', 'LD_LIBRARY_PATH': '/usr/local/nvidia/lib64'}
