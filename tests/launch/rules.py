# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a manifest: its schema's word, Kubernetes' own, and what both cannot say.

Two schema checks (JobSet and Kueue against their reduced definitions, the Job inside against
Kubernetes' own), then the arithmetic that webhooks, GKE and our processes depend on.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMAS = Path(__file__).parents[2] / "launch" / "schemas"
KUBERNETES = "1.34"
CHIPS = ("google.com/tpu", "nvidia.com/gpu")
ACTIONS = ("FailJob", "FailIndex", "Ignore", "Count")


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return [document for document in yaml.safe_load_all(text) if document]


def errors(text: str) -> list[str]:
    """All that is wrong; nothing for a good manifest."""
    found = []
    for document in documents(text):
        kind = document.get("kind", "?")
        file = SCHEMAS / f"{kind}.json"
        if file.exists():
            validator = jsonschema.Draft202012Validator(json.loads(file.read_text()))
            found += [
                f"{kind}: {e.json_path}: {e.message[:200]}" for e in validator.iter_errors(document)
            ]
        else:
            found += kubernetes(document)
        if kind == "JobSet" and not found:
            found += list(jobset(document))
    return found


def kubernetes(document: dict[str, Any]) -> list[str]:
    """What Kubernetes' schema says of one of its own kinds."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
        return [str(error)[:300]]
    return []


def jobset(document: dict[str, Any]) -> Iterator[str]:
    """The rules beyond the schema."""
    spec, name = document["spec"], document["metadata"]["name"]
    for group in spec["replicatedJobs"]:
        job = group["template"]["spec"]
        yield from kubernetes(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}
        )
        hosts, pod = job.get("parallelism"), job["template"]["spec"]
        if hosts != job.get("completions"):
            yield "parallelism is not completions"
        if job.get("completionMode") != "Indexed":
            yield "the job is not indexed"
        if job.get("backoffLimit") != 0:
            yield "backoffLimit would start one pod again without the others"
        longest = f"{name}-{group['name']}-{group['replicas'] - 1}-{(hosts or 1) - 1}-abcde"
        if len(longest) > 63:
            yield f"pod names are too long: {longest}"
        if pod.get("restartPolicy") != "Never":
            yield "podFailurePolicy needs restartPolicy: Never"
        yield from policy(spec, job, pod)
        yield from accelerators(document, group, job, pod)
        yield from mounts(pod)


def policy(spec: dict, job: dict, pod: dict) -> Iterator[str]:
    """A preemption restarts everything and is not counted."""
    rules = job.get("podFailurePolicy", {}).get("rules", [])
    if any(rule["action"] not in ACTIONS for rule in rules):
        yield "podFailurePolicy: unknown action"
    names = [c["name"] for c in pod["containers"]]
    codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    caught = [code for c in codes if c["operator"] == "In" for code in c["values"]]
    if caught != [42] or any(c.get("containerName") not in names for c in codes):
        yield "exit code 42 of the container is not the one that is caught"
    conditions = [c for rule in rules for c in rule.get("onPodConditions", [])]
    if {"type": "DisruptionTarget", "status": "True"} not in conditions:
        yield "disruptions are counted as failures"
    if any(rule["action"] != "FailJob" for rule in rules):
        yield "a preempted pod would not end its job"
    free = [
        rule
        for rule in spec.get("failurePolicy", {}).get("rules", [])
        if rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        and rule.get("onJobFailureReasons") == ["PodFailurePolicy"]
    ]
    if not free:
        yield "preemptions burn restarts"
    if pod.get("terminationGracePeriodSeconds", 30) < 60:
        yield "no time to save"


def accelerators(document: dict, group: dict, job: dict, pod: dict) -> Iterator[str]:
    """Hosts x chips is the slice; every process knows its peers."""
    hosts, slices = job["parallelism"], group["replicas"]
    limits = {
        k: v for c in pod["containers"] for k, v in c.get("resources", {}).get("limits", {}).items()
    }
    selector = pod.get("nodeSelector", {})
    environ = {e["name"]: e for c in pod["containers"] for e in c["env"]}
    if "google.com/tpu" in limits:
        shape = selector.get("cloud.google.com/gke-tpu-topology", "")
        if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
            yield "no node selector of the TPU topology"
        elif math.prod(map(int, shape.split("x"))) != hosts * limits["google.com/tpu"]:
            yield f"{hosts} hosts x {limits['google.com/tpu']} chips are not {shape}"
        known = ("tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice")
        if selector.get("cloud.google.com/gke-tpu-accelerator") not in known:
            yield "no node selector of the TPU generation"
        exclusive = document["metadata"].get("annotations", {})
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        if hosts > 1 and exclusive.get(key) != "cloud.google.com/gke-nodepool":
            yield "two slices could share a node pool"
        if not pod.get("hostNetwork") or pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
            yield "TPU hosts talk over the host's network, with the cluster's names"
    else:
        if slices != 1:
            yield "processes are counted in one job alone"
        if environ.get("M2JAX_NUM_PROCESSES", {}).get("value") != str(hosts):
            yield "M2JAX_NUM_PROCESSES is not the number of pods"
        name = document["metadata"]["name"]
        first = f"{name}-{group['name']}-0-0.{name}:"
        if not environ.get("M2JAX_COORDINATOR", {}).get("value", "").startswith(first):
            yield "M2JAX_COORDINATOR is not the first pod"
        field = environ.get("M2JAX_PROCESS_ID", {}).get("valueFrom", {}).get("fieldRef", {})
        if (
            field.get("fieldPath")
            != "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        ):
            yield "M2JAX_PROCESS_ID is not the pod's index"
        if not document["spec"].get("network", {}).get("enableDNSHostnames"):
            yield "pods have no host names"
        shm = [
            m for c in pod["containers"] for m in c["volumeMounts"] if m["mountPath"] == "/dev/shm"
        ]
        if not shm:
            yield "NCCL would find 64 MB of shared memory"
    keys = {t.get("key") for t in pod.get("tolerations", [])}
    if not keys >= {k for k in limits if k in CHIPS}:
        yield "no toleration of the accelerator nodes' taint"


def mounts(pod: dict) -> Iterator[str]:
    """Volumes and mounts name each other, and the work directory lies on one or in a bucket."""
    volumes = {v["name"] for v in pod.get("volumes", [])}
    for container in pod["containers"]:
        mounted = {m["name"] for m in container.get("volumeMounts", [])}
        if mounted != volumes:
            yield f"volumes {sorted(volumes)} but mounts {sorted(mounted)}"
        words = container["command"]
        workdir = words[words.index("--workdir") + 1]
        paths = [m["mountPath"] for m in container.get("volumeMounts", [])]
        if "://" not in workdir and not any(workdir.startswith(f"{p}/") for p in paths):
            yield f"{workdir} ends with the container"
