# SPDX-License-Identifier: Apache-2.0
"""What ``m2jax launch`` refuses, in one line that names the mend; what it passes on."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="needs the package jinja2")

from m2jax.cli.main import main
from m2jax.launch import job as job_lib
from m2jax.launch import submit
from m2jax.launch.render import TARGETS

ROOT = Path(__file__).parents[2]
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
    ("slurm --config emoji --restarts -1", "--restarts -1: must be at least 0"),
    ("slurm --config emoji --grace 0", "--grace 0: must be at least 1"),
    ("slurm --config emoji --cpus-per-task -1", "--cpus-per-task -1: must be at least 0"),
    ("slurm --config emoji --time 5", "told to end 300 s before its limit"),
    ("slurm --config emoji --time 0-0:04 --grace 240", "told to end 240 s before its limit"),
    ("slurm --config emoji --time UNLIMITED", "write MINUTES, H:MM:SS or D-HH:MM:SS"),
    ("slurm --config emoji --grace 70000", "Slurm takes at most 65535"),
    ("slurm --config emoji --queue=-x", "--queue -x: holds characters"),
    ("slurm --config emoji --queue 中文", "--queue 中文: holds characters"),
    ('slurm --config emoji --program "it\'s"', "--program it's: No closing quotation"),
    ("slurm --config emoji --program ''", "--program: is empty"),
    ("slurm --config emoji --env A=1 --env A=2", "--env A: is set twice"),
    ("slurm --config emoji --env PYTHONUNBUFFERED=0", "is set twice"),
    (f"{OK} --env M2JAX_PROCESS_ID=0", "the job sets it for each process"),
    (f"{OK} --queue Team_A", "no name of a Kueue queue"),
    ("jobset --config emoji --image '' --workdir gs://b/r", "--image: is empty"),
    ("slurm --config pretrain_1b:h100-256 --config.train.accumulate=7", "of 7 micro-batches"),
    ("sky --config emoji --topology gpu:2x4 --workdir gs://b/r", "must know which GPU"),
    (
        "tpu-vm --config pretrain_10b --topology v5p:4x4x16 --image i --zone z --workdir gs://b/r "
        "--config.mesh.data=16",
        "would get 4x8x8 shape",
    ),
    (
        "xpk --config pretrain_10b:v5p-128 --image r/m:1 --cluster c --workdir gs://b/r "
        "--env 'A=say \"hi\"'",
        "xpk breaks quotes",
    ),
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
        (OK, [["kubectl", "create", "-f", "pretrain-10b-v5p-128"]]),
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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93_600), ("1-2:30", 95_400),
     ("1-00:00:05", 86_405)],
)  # fmt: skip
def test_limits_are_read_as_slurm_reads_them(text, seconds) -> None:
    assert job_lib.seconds_of(text) == seconds


def run_with_stubs(tmp_path, capsys, codes: list[int], *words: str) -> tuple[int, str, list[str]]:
    """Runs a rendered batch script as often as it is requeued; srun ends with each code in turn."""
    assert main(["launch", "slurm", "--config", "emoji", *words]) == 0
    script = tmp_path / "job.sh"
    script.write_text(capsys.readouterr().out)
    stubs = tmp_path / "bin"
    stubs.mkdir()
    srun = "n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n\nset -- $CODES; shift $n; exit $1"
    scontrol = 'echo "$*" >>calls\nif [ $1 = show ]; then echo " JobState=RUNNING "; fi'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (stubs / name).write_text("#!/bin/bash\n" + body + "\n")
        (stubs / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environ["CODES"] = " ".join(map(str, codes))
    text, code, done = "", 0, 0
    while True:
        ended = subprocess.run(
            ["bash", str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        text, code, done = text + ended.stdout + ended.stderr, ended.returncode, done + 1
        log = tmp_path / "calls"
        calls = log.read_text().splitlines() if log.exists() else []
        if sum(line == "requeue 7" for line in calls) < done:
            return code, text, calls


@pytest.mark.parametrize(
    ("codes", "last"),
    [
        ([0], 0),
        ([2], 2),
        ([1, 1, 1], 1),  # two restarts, and no third
        ([42, 1, 42, 137, 43], 43),  # preemptions do not count
        ([42, 42, 42, 42, 0], 0),
    ],
)
def test_a_slurm_job_comes_back_as_often_as_it_may(codes, last, tmp_path, capsys) -> None:
    code, text, calls = run_with_stubs(tmp_path, capsys, codes, "--restarts", "2")
    assert code == last, text
    assert calls.count("requeue 7") == len(codes) - 1


def test_failures_that_cannot_be_counted_are_not_tried_again(tmp_path, capsys) -> None:
    (tmp_path / "failures-7").mkdir()  # root may write anywhere, but not into a folder's name
    code, _, calls = run_with_stubs(tmp_path, capsys, [1, 1, 1, 1])
    assert (code, calls) == (1, [])


def test_flags_reach_the_batch_script(capsys) -> None:
    words = "--account acc --cpus-per-task 3 --time 2:00:00 --queue part"
    assert main(["launch", "slurm", "--config", "emoji", *words.split()]) == 0
    text = capsys.readouterr().out
    for line in ("--account=acc", "--cpus-per-task=3", "--time=2:00:00", "--partition=part"):
        assert f"#SBATCH {line}\n" in text


def test_flags_reach_xpk_and_gcloud(capsys) -> None:
    common = "--config pretrain_10b:v5p-128 --image r/m:1"
    assert main(["launch", "xpk", *f"{common} --cluster c --storage s".split()]) == 0
    assert "--storage=s" in capsys.readouterr().out
    words = f"{common} --zone z --project p --workdir gs://b/r".split()
    assert main(["launch", "tpu-vm", *words]) == 0
    assert "place=(--project=p --zone=z)" in capsys.readouterr().out


def test_a_bucket_is_written_to_as_one(capsys) -> None:
    assert main(["launch", *shlex.split(f"{JOBSET} --storage gs://b --name n")]) == 0
    text = capsys.readouterr().out
    assert "gs://b/n" in text
    assert "bucketName: b\n" in text
    assert 'gke-gcsfuse/volumes: "true"' in text


def test_eight_flat_chips_are_one_vm(capsys) -> None:
    words = "--config emoji --topology v6e:2x4 --image i --zone z --workdir gs://b/r"
    assert main(["launch", "tpu-vm", *words.split()]) == 0
    assert "v6e:2x4: 1 hosts" in capsys.readouterr().out


def test_stores_bring_their_packages(capsys) -> None:
    words = "--config pretrain_1b:h100-8 --workdir s3://b/r"
    assert main(["launch", "sky", *words.split()]) == 0
    assert "'.[cuda13,s3]'" in capsys.readouterr().out
    for file in ("tpu", "cuda"):
        text = (ROOT / "launch" / "docker" / f"{file}.Dockerfile").read_text()
        assert "gcs,s3,wandb]'" in text


def test_a_config_that_exits_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "c.py").write_text("import sys\nsys.exit(5)\n")
    assert main(["launch", "slurm", "--config", str(tmp_path / "c.py")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
