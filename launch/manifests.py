"""The same run for other launchers: a Kubernetes JobSet, as xpk makes them, and a SkyPilot task.

Sources: JobSet's v1alpha2 reference, the JobSets that xpk 0.14 writes, GKE's pages on TPUs and on Cloud
Storage FUSE, cfg/params.yaml of gcsfuse 3.11, SkyPilot's YAML reference; read in 2026.
"""
import shlex

import yaml

from launch import config as configs
from launch.accelerators import accelerator, topology
from lskd_jax import exit_codes

CONTAINER = "train"
PORT = 8482  # of the coordinator, as JAX has it on TPU machines
# As in setup.sh, which says why. What SkyPilot mounts with serves, too: folders with up to 10000 files, 5 s.
MOUNT_OPTIONS = ("implicit-dirs", "file-system:rename-dir-limit:200000", "metadata-cache:ttl-secs:5",
                 "metadata-cache:negative-ttl-secs:0")
# Codes after which a JobSet is started again. xpk has 42 and 127 to 255 by itself, not 43.
RESTARTED = [code for code in range(1, 256) if exit_codes.restarts(code)]


def jobset(config) -> dict:
  """A JobSet with one job per slice and one pod per host.

  A code that a restart does not cure fails the job by its pod failure policy, and with it the JobSet; all
  others restart everything. JobSet does not know about checkpoints, so maxRestarts counts preemptions, too.
  """
  kind = accelerator(config.accelerator_type)
  chips = {"google.com/tpu": kind.chips_per_host}
  container = {
      "name": CONTAINER, "image": config.image,
      # exec: the SIGTERM of a preemption goes to pid 1, which has to be the command itself.
      "command": ["bash", "-c", f"exec {shlex.join(configs.words(config))}"],
      "env": [{"name": name, "value": str(value)} for name, value in {
          "JAX_COORDINATOR_ADDRESS": f"{config.name}-slice-0-0.{config.name}:{PORT}",
          **config.environment}.items()],
      "ports": [{"containerPort": PORT}],
      "resources": {"requests": dict(chips), "limits": dict(chips)},
      "volumeMounts": [{"name": "bucket", "mountPath": config.mount}]}
  selector = {"cloud.google.com/gke-tpu-accelerator": kind.family.gke,
              "cloud.google.com/gke-tpu-topology": config.topology or topology(kind)}
  tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
  if config.provisioning == "spot":
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                        "effect": "NoSchedule"})
  pod = {
      "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
      "spec": {
          "restartPolicy": "Never",  # a pod failure policy asks for it
          "terminationGracePeriodSeconds": round(config.grace_seconds),
          "serviceAccountName": config.service_account,
          "nodeSelector": selector, "tolerations": tolerations, "containers": [container],
          "volumes": [{"name": "bucket", "csi": {
              "driver": "gcsfuse.csi.storage.gke.io",
              "volumeAttributes": {"bucketName": config.bucket.removeprefix("gs://"),
                                   "mountOptions": ",".join(MOUNT_OPTIONS)}}}]}}
  job = {
      "parallelism": kind.hosts, "completions": kind.hosts, "completionMode": "Indexed",
      "backoffLimit": 0,  # a single pod cannot go on without the others
      "podFailurePolicy": {"rules": [{
          "action": "FailJob",
          "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": RESTARTED}}]},
      "template": pod}
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
      "metadata": {"name": config.name, "namespace": config.namespace, "annotations": {
          # One slice to a node pool: its hosts are joined by the fast network.
          "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}},
      "spec": {
          "network": {"enableDNSHostnames": True, "subdomain": config.name},  # makes the headless service
          "failurePolicy": {
              "maxRestarts": config.max_preemptions,
              "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{"name": "slice", "replicas": config.nodes, "template": {"spec": job}}]}}


def skypilot(config) -> dict:
  """A SkyPilot managed job: `sky jobs launch FILE` recovers it from preemptions on its own."""
  kind = accelerator(config.accelerator_type)
  return {
      "name": config.name,
      "workdir": config.source,
      "num_nodes": 1,  # a slice; of several, each would be a run of its own
      "resources": {
          "infra": f"gcp/{config.zone.rpartition('-')[0]}/{config.zone}",
          "accelerators": f"tpu-{config.accelerator_type}",
          "accelerator_args": {"runtime_version": config.runtime_version or kind.family.runtime},
          "use_spot": config.provisioning == "spot",
          "job_recovery": {"max_restarts_on_errors": config.max_failures,
                           "recover_on_exit_codes": list(exit_codes.PREEMPTIONS)}},
      "envs": {name: str(value) for name, value in config.environment.items()},
      "file_mounts": {config.mount: {"source": config.bucket, "mode": "MOUNT"}},
      "setup": f"pip install uv=={config.uv}\nuv venv --python {configs.python_version(config)} ~/lskd\n"
               "uv pip install --python ~/lskd/bin/python '.[tpu]'\n",
      "run": f"PATH=~/lskd/bin:$PATH {shlex.join(configs.words(config))}\n"}


def as_yaml(document: dict, remark: str) -> str:
  """YAML with a first line of remark; read back before it is returned, so that it is sure to be YAML."""
  text = f"# {remark}\n" + yaml.dump(document, Dumper=_Readable, sort_keys=False, width=100)
  if yaml.safe_load(text) != document:
    raise AssertionError("the written YAML does not say what was meant")
  return text


class _Readable(yaml.SafeDumper):
  """Numbers side by side, scripts as lines."""


def _sequence(dumper, values: list):
  return dumper.represent_sequence("tag:yaml.org,2002:seq", values,
                                   flow_style=all(isinstance(value, int) for value in values))


def _text(dumper, text: str):
  return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(list, _sequence)
_Readable.add_representer(str, _text)
