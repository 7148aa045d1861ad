# SPDX-License-Identifier: Apache-2.0
"""Kubernetes manifests are held against their schemas and rules; spoilt ones do not pass."""

import copy
import itertools
import shlex

import pytest

pytest.importorskip("jinja2", reason="needs the package jinja2")
pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate 1.37")

import yaml

from m2jax.cli.main import main
from tests.launch import rules

TPU = "jobset --config pretrain_10b:v5p-128 --image r/m:1 --storage claim:c --queue q --secret KEY"
GPU = "jobset --config pretrain_1b:h100-256 --image r/m:1 --storage nfs:h:/s --queue q"
MANY = (
    "--config pretrain_10b:v5p-128 --topology v5p:4x4x8",
    "--config pretrain_10b:v6e-256 --topology 2*v6e:16x16 --config.mesh.replica=2",
    "--config pretrain_0p4b:v5p-512 --namespace research",
    "--config pretrain_1b:h100-8",
    "--config pretrain_1b:h200-256 --node-selector example.com/gpu=h200 --node-selector spot=",
    "--config emoji --nodes 2",
    "--config emoji --nodes 1 --restarts 0 --grace 60",
    f"--config pretrain_10b:v5p-128 --name {'a' * 46}",  # one more is refused
)
PLACES = (
    "--workdir gs://b/run",
    "--storage gs://b",
    "--storage claim:c --data /m2jax/data",
    "--storage nfs:h:/s --env A='x: \"y\" #z' --secret TOKEN_A --secret TOKEN_B",
    # Words that YAML would read as something else.
    "--storage claim:123 --name null --namespace 123 --env NO=1 --secret NULL --queue true",
    "--storage nfs:10.0:/ --name yes --node-selector true=x --node-selector 1.5=y",
)


def printed(words, capsys) -> str:
    assert main(["launch", *shlex.split(words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("machine", "place"), list(itertools.product(MANY, PLACES)))
def test_every_manifest_passes(machine, place, capsys) -> None:
    text = printed(f"jobset --image r/m:1 --queue q {machine} {place}", capsys)
    assert rules.errors(text) == []


@pytest.mark.parametrize("machine", MANY[:5])
def test_every_queue_passes(machine, capsys) -> None:
    line = f"jobset --image r/m:1 --queue q --workdir gs://b/r --queue-objects {machine}"
    text = printed(line, capsys)
    assert rules.errors(text) == []
    flavor, cluster, local = rules.documents(text)
    quota = cluster["spec"]["resourceGroups"][0]["flavors"][0]
    assert quota["name"] == flavor["metadata"]["name"]
    job = rules.documents(printed(line.replace(" --queue-objects", ""), capsys))[-1]
    group = job["spec"]["replicatedJobs"][0]
    pod = group["template"]["spec"]["template"]["spec"]
    (limit,) = pod["containers"][0]["resources"]["limits"].items()
    pods = group["replicas"] * group["template"]["spec"]["parallelism"]
    assert (quota["resources"][0]["name"], quota["resources"][0]["nominalQuota"]) == (
        limit[0],
        limit[1] * pods,
    )
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert flavor.get("spec", {}).get("nodeLabels", {}) == pod.get("nodeSelector", {})


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")
BOX = (*POD, "containers", 0)
SELECTOR = "cloud.google.com/gke-tpu-"
SPOILT = [  # what to spoil, where, what it becomes (None: gone; a pair: the key is renamed)
    (TPU, ("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
    (TPU, ("metadata", "name"), "a" * 50),
    (TPU, ("metadata", "annotations"), None),
    (TPU, ("spec", "failurePolicy", "maxRestarts"), "3"),
    (TPU, ("spec", "failurePolicy", "rules"), None),
    (TPU, ("spec", "failurePolicy", "rules", 0, "action"), "RestartJobSet"),
    (TPU, ("spec", "failurePolicy", "rules", 0, "action"), "RestartForever"),
    (TPU, ("spec", "failurePolicy", "rules", 0, "name"), None),
    (TPU, ("spec", "failurePolicy"), ("failurePolicy", "failurepolicy")),
    (TPU, ("spec", "replicatedJobs", 0, "replicas"), "two"),
    (TPU, ("spec", "replicatedJobs", 0, "name"), None),
    (TPU, (*JOB, "parallelism"), 16),
    (TPU, (*JOB, "completions"), None),
    (TPU, (*JOB, "completionMode"), ("completionMode", "completionMod")),
    (TPU, (*JOB, "completionMode"), "NonIndexed"),
    (TPU, (*JOB, "backoffLimit"), 6),
    (TPU, (*JOB, "podFailurePolicy"), None),
    (TPU, (*JOB, "podFailurePolicy", "rules", 0, "onPodConditions", 0, "status"), None),
    (TPU, (*JOB, "podFailurePolicy", "rules", 0, "action"), "Restart"),
    (TPU, (*JOB, "podFailurePolicy", "rules", 1, "action"), "Ignore"),
    (TPU, (*JOB, "podFailurePolicy", "rules", 1, "onExitCodes", "values"), [43]),
    (TPU, (*JOB, "podFailurePolicy", "rules", 1, "onExitCodes", "operator"), "NotIn"),
    (TPU, (*JOB, "podFailurePolicy", "rules", 1, "onExitCodes", "containerName"), "main"),
    (TPU, (*POD, "restartPolicy"), "OnFailure"),
    (TPU, (*POD, "terminationGracePeriodSeconds"), None),
    (TPU, (*POD, "nodeSelector", f"{SELECTOR}topology"), None),
    (TPU, (*POD, "nodeSelector", f"{SELECTOR}topology"), "4x4x4"),
    (TPU, (*POD, "nodeSelector", f"{SELECTOR}accelerator"), "tpu-v5p"),
    (TPU, (*POD, "hostNetwork"), None),
    (TPU, (*POD, "dnsPolicy"), "ClusterFirst"),
    (TPU, (*POD, "tolerations"), None),
    (TPU, (*BOX, "resources", "limits", "google.com/tpu"), 8),
    (TPU, (*BOX, "volumeMounts", 0, "mountPath"), "/data"),
    (TPU, (*BOX, "volumeMounts", 0, "name"), "storrage"),
    (TPU, (*BOX, "env", 0, "value"), 1),
    (TPU, (*BOX, "env", 1, "valueFrom", "secretKeyRef"), ("secretKeyRef", "secretRef")),
    (TPU, (*BOX, "image"), ("image", "imgae")),
    (TPU, (*BOX, "command"), "m2jax train"),
    (GPU, ("spec", "network", "enableDNSHostnames"), False),
    (GPU, ("spec", "replicatedJobs", 0, "replicas"), 2),
    (GPU, ("spec", "replicatedJobs", 0, "name"), "worker"),
    (GPU, (*BOX, "env", 1, "value"), "other-node-0-0.other:55527"),
    (GPU, (*BOX, "env", 2, "value"), "8"),
    (GPU, (*BOX, "env", 3, "valueFrom", "fieldRef", "fieldPath"), "metadata.name"),
    (GPU, (*BOX, "volumeMounts", 1), None),
    (GPU, (*POD, "volumes", 0, "nfs", "path"), None),
]


def spoil(document, path, change) -> None:
    """Changes one place of a document."""
    *parents, last = path
    for key in parents:
        document = document[key]
    before = document[last]  # raises where there is nothing to spoil
    if change is None:
        del document[last]
    elif isinstance(change, tuple):
        document[change[1]] = document.pop(change[0])
    else:
        assert before != change
        document[last] = change


@pytest.mark.parametrize(
    ("words", "path", "change"),
    SPOILT,
    ids=[f"{'.'.join(map(str, path[-3:]))}={change}" for _, path, change in SPOILT],
)
def test_a_spoilt_manifest_fails(words, path, change, capsys) -> None:
    good = rules.documents(printed(words, capsys))[-1]
    bad = copy.deepcopy(good)
    spoil(bad, path, change)
    assert rules.errors(yaml.safe_dump(good)) == []
    assert rules.errors(yaml.safe_dump(bad)) != []


def test_thirty_and_more_are_spoilt() -> None:
    assert len(SPOILT) >= 30


def test_an_own_config_is_brought_along(tmp_path, capsys) -> None:
    text = 'from m2jax.config import as_config_dict\n\n\ndef get_config(arg=""):\n'
    text += '    """Says: "yes" & \'no\' \\\\ 中文."""\n    return as_config_dict()\n'
    (tmp_path / "mine.py").write_text(text)
    line = f"jobset --config {tmp_path}/mine.py:x --image r/m:1 --workdir gs://b/r"
    config, job = rules.documents(printed(line, capsys))
    assert rules.errors(yaml.safe_dump_all([config, job])) == []
    assert config["data"] == {"mine.py": text}
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    box = pod["containers"][0]
    assert box["command"][3] == "/etc/m2jax/mine.py:x"
    assert {"name": "config", "mountPath": "/etc/m2jax"} in box["volumeMounts"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
