"""The same run for Kubernetes and SkyPilot: what is written is read back and compared with golden files."""
import pytest
import yaml

from launch import __main__ as command_line
from lskd_jax import exit_codes

WORDS = ["--config", "configs/launch_v5e.py", "--config.bucket=gs://bucket", "--config.project=p",
         "--config.python=3.12"]


@pytest.fixture
def written(tmp_path):
  """The document that a verb writes, and its text."""
  def write(verb, *words):
    path = tmp_path / "out.yaml"
    assert command_line.main([verb, *WORDS, *words, "--out", str(path)]) == 0
    return yaml.safe_load(path.read_text()), path.read_text()
  return write


@pytest.fixture
def jobset(written):
  return written("manifest", "--config.accelerator_type=tpu7x-128", "--config.nodes=2", "--config.image=img")


def test_the_jobset_is_the_golden_one(jobset, golden):
  golden("jobset.yaml", jobset[1])


def test_a_job_is_a_slice_and_a_pod_is_a_host(jobset):
  slices, = jobset[0]["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu7x"
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"


def test_kubernetes_restarts_what_the_table_of_exit_codes_says(jobset):
  """43 is not among the codes that xpk restarts by itself."""
  job = jobset[0]["spec"]["replicatedJobs"][0]["template"]["spec"]
  rule, = job["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
  values = rule["onExitCodes"]["values"]
  assert {42, 43, 134, 137, 143, exit_codes.STUCK, exit_codes.PEER_LOST} <= set(values)
  assert not {1, 2, 3, 4, 41, exit_codes.INTERRUPTED} & set(values)
  assert job["template"]["spec"]["restartPolicy"] == "Never", "without it a pod failure policy is refused"
  assert job["backoffLimit"] == 0
  assert jobset[0]["spec"]["failurePolicy"]["rules"] == [
      {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


def test_sigterm_reaches_the_command(jobset):
  pod = jobset[0]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["command"][2].startswith("exec lskd train")
  assert pod["terminationGracePeriodSeconds"] == 300


def test_pods_find_their_coordinator_through_the_headless_service(jobset):
  spec = jobset[0]["spec"]
  assert spec["network"] == {"enableDNSHostnames": True, "subdomain": "lskd-v5e"}
  env = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["env"]
  assert {"name": "JAX_COORDINATOR_ADDRESS", "value": "lskd-v5e-slice-0-0.lskd-v5e:8482"} in env


def test_the_skypilot_task_is_the_golden_one(written, golden):
  document, text = written("skypilot")
  golden("skypilot.yaml", text)
  assert document["resources"]["use_spot"] is True
  assert document["resources"]["job_recovery"]["recover_on_exit_codes"] == [42, 43]
