# SPDX-License-Identifier: Apache-2.0
"""What we print, read by the tools it is for: xpk's own dry run, SkyPilot's own task parser.

Each lives in an environment of its own (``make test-launch`` makes them); their dependencies and
ours do not mix.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate 1.37")

from m2jax.launch.machine import CUBE, FLAT, TPUS, parse
from tests.launch import rules

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "launch" / "examples"
XPK = ROOT / ".venv-xpk" / "bin"
SKY = ROOT / ".venv-sky" / "bin"

needs_xpk = pytest.mark.skipif(not (XPK / "xpk").exists(), reason="needs xpk: make test-launch")
needs_sky = pytest.mark.skipif(not (SKY / "sky").exists(), reason="needs sky: make test-launch")


def run(words, home, **environ) -> str:
    """A tool's output; its settings go into an empty home, its statistics nowhere."""
    quiet = {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", **environ}
    done = subprocess.run(words, env=os.environ | quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def of_xpk(script: str, tmp_path: Path) -> dict:
    """The JobSet that xpk makes of a script of ours."""
    manifest = tmp_path / "manifest.yaml"
    assert "--command=" in script
    project = "" if "--project=" in script else "--project=p "
    words = script.replace(
        "xpk workload create",
        f"xpk workload create {project}--dry-run --output-manifest-file={manifest}",
    )
    file = tmp_path / "job.sh"
    file.write_text(words)
    run(["bash", str(file)], tmp_path, PATH=f"{XPK}:{os.environ['PATH']}")
    (made,) = yaml.safe_load_all(manifest.read_text())
    return made


@needs_xpk
def test_xpk_makes_of_our_command_what_we_make_ourselves(tmp_path) -> None:
    made = of_xpk((EXAMPLES / "xpk-2-slices.sh").read_text(), tmp_path)
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    machine = parse("2*v6e:16x16")
    assert (group["replicas"], job["parallelism"], job["completions"]) == (2, 64, 64)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": machine.host_chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == machine.tpu.gke
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == machine.shape
    assert pod["terminationGracePeriodSeconds"] == 300
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 100
    (codes,) = [r["onExitCodes"] for r in job["podFailurePolicy"]["rules"]]
    assert codes["operator"] == "NotIn"  # all others start again
    assert {1, 42, 43, 137} <= {*codes["values"]}
    assert 2 not in codes["values"]  # bad input does not
    (ours,) = rules.documents((EXAMPLES / "jobset-2-slices.yaml").read_text())
    (our_group,) = ours["spec"]["replicatedJobs"]
    our_pod = our_group["template"]["spec"]["template"]["spec"]
    for key in ("nodeSelector", "hostNetwork", "dnsPolicy", "restartPolicy"):
        kept = {k: v for k, v in pod[key].items() if v} if key == "nodeSelector" else pod[key]
        assert our_pod[key] == kept, key


@needs_xpk
def test_xpk_runs_our_words_with_the_peers_it_knows(tmp_path) -> None:
    """The line of shell inside xpk's wrapper, run here with xpk's own variables."""
    made = of_xpk((EXAMPLES / "xpk-h100.sh").read_text(), tmp_path)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 32
    box = job["template"]["spec"]["containers"][0]
    names = {entry["name"] for entry in box["env"]}
    assert {"JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK"} <= names
    program = tmp_path / "bin" / "m2jax"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\nprintf "%s " "${!M2JAX_@}" "$M2JAX_COORDINATOR" "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{program.parent}:{os.environ['PATH']}", "NNODES": "32", "NODE_RANK": "5"}
    environ |= {"JAX_COORDINATOR_ADDRESS": "w-0-0.w", "JAX_COORDINATOR_PORT": "6002"}
    (shell, option, line) = box["command"]
    line = line.split("echo Main")[0]  # the rest tells a sidecar
    out = run([shell, option, line], tmp_path, **environ)
    assert "M2JAX_COORDINATOR M2JAX_NUM_PROCESSES M2JAX_PROCESS_ID w-0-0.w:6002 train" in out
    assert "--config configs/pretrain_1b.py:h100-256" in out


@needs_xpk
def test_xpk_knows_every_machine_as_we_do(tmp_path) -> None:
    ask = (
        "import dataclasses, json\n"
        "from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as all\n"
        "keep = ('topology', 'vms_per_slice', 'gke_accelerator', 'chips_per_vm')\n"
        "print(json.dumps({k: [getattr(v, f) for f in keep] for k, v in all.items()}))"
    )
    known = json.loads(run([str(XPK / "python"), "-c", ask], tmp_path).splitlines()[-1])
    checked = 0
    for kind, tpu in TPUS.items():
        shapes = [*(FLAT if tpu.shapes is FLAT else CUBE).values()]
        for shape in shapes:
            machine = parse(f"{kind}:{shape}")
            chips = machine.hosts * machine.host_chips
            said = known.get(f"{tpu.gce}-{shape}") or known.get(tpu.accelerator_type(chips))
            if said is None:  # shapes that Cloud has and xpk's list has not
                continue
            assert said == [shape, machine.hosts, tpu.gke, machine.host_chips], (kind, shape)
            checked += 1
    assert checked >= 30


@needs_sky
@pytest.mark.parametrize("name", ["sky-h100.yaml", "sky-v6e.yaml"])
def test_skypilot_reads_our_task(name, tmp_path) -> None:
    ask = (
        "import sys, yaml, json\n"
        "from sky import task\n"
        "t = task.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])))\n"
        "(r,) = t.resources\n"
        "print(json.dumps([t.num_nodes, r.accelerators, r.use_spot, r.job_recovery, t.run]))"
    )
    environ = {"WANDB_API_KEY": "x"}
    text = (EXAMPLES / name).read_text().replace("WANDB_API_KEY: null", "WANDB_API_KEY: x")
    (tmp_path / name).write_text(text)
    out = run([str(SKY / "python"), "-c", ask, str(tmp_path / name)], tmp_path, **environ)
    nodes, accelerators, spot, recovery, command = json.loads(out.splitlines()[-1])
    assert (nodes, spot) == (1, True)
    assert accelerators == ({"H100": 8} if "h100" in name else {"tpu-v6e-256": 1})
    assert (recovery["recover_on_exit_codes"], recovery["max_restarts_on_errors"]) == ([42], 3)
    assert "m2jax train" in command


@needs_sky
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_nodes:", "num_node:"),
        ("job_recovery:", "job_recover:"),
        ("recover_on_exit_codes: [42]", "recover_on_exit_codes: [420]"),
        ("max_restarts_on_errors: 3", "max_restarts_on_errors: many"),
        ("envs:", "env:"),
        ("use_spot: true", "use_spot: sometimes"),
    ],
)
def test_skypilot_refuses_a_spoilt_task(old, new, tmp_path) -> None:
    text = (EXAMPLES / "sky-v6e.yaml").read_text()
    assert old in text
    (tmp_path / "task.yaml").write_text(text.replace(old, new))
    ask = "import sys, yaml\nfrom sky import task\n"
    ask += "task.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])))"
    done = subprocess.run(
        [str(SKY / "python"), "-c", ask, str(tmp_path / "task.yaml")],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Invalid" in done.stderr or "rror" in done.stderr
