# SPDX-License-Identifier: Apache-2.0
"""What ``m2jax launch`` refuses, in one line that names the mend; what it passes on."""

import json
import re
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("jinja2", reason="needs the package jinja2")

from m2jax.cli.main import main
from m2jax.launch import submit
from m2jax.launch.render import TARGETS

JOBSET = "jobset --config pretrain_10b:v5p-128 --image r/m:1"
OK = f"{JOBSET} --workdir gs://b/r"

REFUSED = [
    ("slurm --config pretrain_10b:v5p-128", "slurm takes gpu or cpu machines"),
    ("mpi --config pretrain_10b:v5p-128", "mpi takes gpu or cpu machines"),
    ("tpu-vm --config pretrain_10b:h100-8 --image i --zone z --workdir gs://b/r", "takes tpu"),
    (
        "tpu-vm --config pretrain_10b:v5p-128 --topology 2*v5p:4x4x8 --config.mesh.replica=2 "
        "--image i --zone z --workdir gs://b/r",
        "takes one slice",
    ),
    ("slurm --config pretrain_10b:h100-256 --nodes 2", "--nodes 2: .* has 32 hosts"),
    ("slurm --config pretrain_10b:h100-256 --topology h100:16x8", "axes take 256 devices but"),
    (f"{OK} --topology 2*v5p:4x4x8", "axes take 128 devices but there are 256"),
    (
        f"{OK} --topology 2*v5p:4x4x4",
        "only this axis may cross between them: add --config.mesh.replica=2",
    ),
    ("slurm --config emoji --nodes 3", "batch_size=128: does not divide over 6 shards"),
    (
        "slurm --config emoji --nodes 2 --config.mesh.data=1 --config.mesh.model=-1",
        "no multiple of the 2 processes",
    ),
    ("slurm --config pretrain_10b:h100-8 --tasks-per-node 3", "does not divide the 8"),
    ("slurm --config emoji --restarts -1", "--restarts at least 0"),
    ("slurm --config emoji --grace 0", "--grace and"),
    ("slurm --config emoji --name Emoji_1", "must be lower-case"),
    ("slurm --config emoji --name=-x", "must be lower-case"),
    (f"{OK} --name {'a' * 47}", "leave room for 46: shorten it"),
    (
        f"xpk {JOBSET.removeprefix('jobset ')} --cluster c --workdir gs://b/r --name {'a' * 41}",
        "40",
    ),
    ("slurm --config emoji --queue 'a b'", "--queue a b: holds characters"),
    ("slurm --config emoji --time 1d", "--time 1d: holds characters"),
    ("slurm --config emoji --account 'x\n#SBATCH --uid=0'", "--account x"),
    ("slurm --config emoji --workdir 'x\nrm -rf /'", "control characters: take them out"),
    ("slurm --config emoji --config.data.dir 'x\nrm -rf /'", "control characters: take them out"),
    ("slurm --config emoji --env 'A=x\ny'", "control characters"),
    ("slurm --config emoji --env A", "--env A: has no value"),
    ("slurm --config emoji --env 1A=x", "no name of an environment variable"),
    ("slurm --config emoji --env 'A$(x)=x'", "no name of an environment variable"),
    ("slurm --config emoji --env WANDB_API_KEY=x", "use --secret WANDB_API_KEY"),
    ("slurm --config emoji --env HF_TOKEN=x", "for others to read"),
    ("slurm --config emoji --env aws_secret_access_key=x", "for others to read"),
    (JOBSET, "--workdir runs/.*: a folder of the container"),
    (f"{JOBSET} --storage claim:c --workdir /data/run", "lies outside /m2jax"),
    (f"{JOBSET} --storage claim:c --workdir /m2jax/../x", "lies outside /m2jax"),
    (f"{OK} --data /data", "--data /data: a folder of the container"),
    (f"{JOBSET} --storage /shared", "jobset takes claim:NAME"),
    ("sky --config emoji --storage claim:c", "sky takes gs://BUCKET"),
    (f"{OK} --node-selector 'a b=c'", "no Kubernetes label"),
    (f"{OK} --queue-objects", "needs --queue NAME"),
    (f"{OK} --namespace Team_A", "--namespace Team_A: holds"),
    ("slurm --config nowhere", "no such config"),
    ("slurm --config emoji --config.data.batchsize=1", "no such key"),
    ("xpk --config emoji --image i --cluster c --workdir gs://b/r", "xpk takes tpu or gpu"),
    (
        "xpk --config pretrain_10b:h100-8 --topology gpu:1x8 --image i --cluster c "
        "--workdir gs://b/r",
        "xpk takes hosts of 8 GPUs",
    ),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=range(len(REFUSED)))
def test_it_is_refused_in_one_line(words, said, capsys) -> None:
    assert main(["launch", *shlex.split(words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(said, err), err


def test_an_own_config_needs_a_way_into_the_image(tmp_path, capsys) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from m2jax.config import as_config_dict as get_config\n")
    line = f"launch xpk --config {file} --topology v6e:1x1 --image i --cluster c --workdir gs://b/r"
    assert main(line.split()) == 2
    assert "build it in" in capsys.readouterr().err
    line = f"launch tpu-vm --config {file} --topology v6e:1x1 --image i --zone z --workdir gs://b/r"
    assert main(line.split()) == 0
    script = capsys.readouterr().out
    assert f"scp {file} " in script
    assert '-v "$HOME/mine.py:/etc/m2jax/mine.py:ro"' in script
    assert "--config /etc/m2jax/mine.py" in script


def test_hostile_words_stay_words(capsys, tmp_path) -> None:
    """A shell that runs the script's own lines sees each value whole, and runs none of it."""
    evil = "$(touch pwned) `touch pwned` '\"; touch pwned; #"
    line = ["launch", "mpi", "--config", "emoji", "--workdir", f"runs/{evil}", "--env", f"A={evil}"]
    assert main([*line, "--nodes", "1", "--hostfile", evil]) == 0
    script = capsys.readouterr().out
    echo = 'mpirun() { printf "%s\\n" "$@"; printf "A=%s\\n" "$A"; }\n'
    done = subprocess.run(
        ["bash", "-c", echo + script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert seen[seen.index("--hostfile") + 1] == evil
    assert seen[seen.index("--workdir") + 1] == f"runs/{evil}"
    assert seen[-1] == f"A={evil}"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_submit_says_what_is_missing(target, capsys, monkeypatch) -> None:
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    line = {
        "slurm": "slurm --config emoji",
        "mpi": "mpi --config emoji",
        "sky": "sky --config pretrain_1b:h100-8 --workdir gs://b/r",
        "jobset": OK,
        "xpk": f"{OK} --cluster c".replace("jobset", "xpk"),
        "tpu-vm": f"{OK} --zone z".replace("jobset", "tpu-vm"),
    }[target]
    assert main(["launch", *line.split(), "--submit"]) == 2
    assert "is not on the PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "ran"),
    [
        ("slurm --config emoji", [["sbatch", "emoji"]]),
        (OK, [["kubectl", "apply", "-f", "pretrain-10b-v5p-128"]]),
        (
            f"{OK} --zone z".replace("jobset", "tpu-vm"),
            [["bash", "pretrain-10b-v5p-128", "create"], ["bash", "pretrain-10b-v5p-128", "start"]],
        ),
        (
            "sky --config pretrain_1b:h100-8 --workdir gs://b/r --secret A_TOKEN",
            [["sky", "jobs", "launch", "--yes", "pretrain-1b-h100-8", "--secret=A_TOKEN"]],
        ),
    ],
)
def test_submit_runs_the_schedulers_own_command(line, ran, tmp_path, monkeypatch) -> None:
    """On stand-ins that write down how they were called, and with which file."""
    for name in ("sbatch", "kubectl", "sky", "gcloud", "bash"):
        file = tmp_path / name
        file.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            "words = [pathlib.Path(w).name if '/' in w else w for w in sys.argv]\n"
            "texts = [pathlib.Path(w).read_text() for w in sys.argv[1:] if '/' in w]\n"
            "assert '# m2jax launch' in texts[0]\n"
            f"with open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
            "    file.write(json.dumps(words) + chr(10))\n"
        )
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *line.split(), "--submit"]) == 0
    calls = [json.loads(s) for s in (tmp_path / "calls").read_text().splitlines()]
    assert calls == ran


def test_a_schedulers_refusal_is_passed_on(tmp_path, monkeypatch) -> None:
    file = tmp_path / "sbatch"
    file.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", "--config", "emoji", "--submit"]) == 3


def test_help_lists_what_a_target_takes_and_no_more(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "slurm", "--help"])
    text = capsys.readouterr().out
    assert "--tasks-per-node" in text
    assert "--image" not in text
    with pytest.raises(SystemExit) as end:
        main(["launch", "slurm", "--config", "emoji", "--image", "i"])
    assert end.value.code == 2
