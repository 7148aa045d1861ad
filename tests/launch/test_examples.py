# SPDX-License-Identifier: Apache-2.0
"""``launch/examples``: each file is what the command in it prints, and runs a command of ours.

``M2JAX_UPDATE=1 pytest tests/launch/test_examples.py`` writes them anew.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jinja2", reason="needs the package jinja2")

from m2jax.cli.main import build_parser, main, split_overrides
from m2jax.config_files import load_config
from m2jax.launch.render import TARGETS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch" / "examples").iterdir())
JOBS = [file for file in FILES if not file.name.startswith("kueue")]


def recipe(file: Path) -> list[str]:
    """The words after ``m2jax`` that print a file, from its own first lines."""
    line = next(s for s in file.read_text().splitlines() if s.startswith("# m2jax "))
    return shlex.split(line.removeprefix("# m2jax "))


def commands(text: str) -> list[list[str]]:
    """Every ``m2jax`` command line in a job: words of a manifest, or of a shell's line."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    found = [
        shlex.split(words)
        for line in joined.splitlines()
        if not line.lstrip().startswith("#")
        for words in re.findall(r"\bm2jax train --config [^\n']*", line)
    ]
    if not found and "kind: JobSet" in text:
        for document in yaml.safe_load_all(text):
            for group in document.get("spec", {}).get("replicatedJobs", []):
                pod = group["template"]["spec"]["template"]["spec"]
                found += [container["command"] for container in pod["containers"]]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_it_is_what_its_command_prints(file, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(recipe(file)) == 0
    printed = capsys.readouterr().out
    if os.environ.get("M2JAX_UPDATE"):
        file.write_text(printed)
    assert file.read_text() == printed


@pytest.mark.parametrize("file", JOBS, ids=lambda f: f.name)
def test_its_command_line_is_one_of_ours(file) -> None:
    """It parses, its config loads and divides over the machine, and it is what was asked for."""
    (words,) = commands(file.read_text())
    assert words[0] == "m2jax"
    others, overrides = split_overrides(words[1:])
    args = build_parser().parse_args(others)
    assert args.verb == "train"
    experiment = load_config(args.config, overrides)
    asked, asked_overrides = split_overrides(recipe(file))
    asked_args = build_parser().parse_args(asked)
    assert load_config(asked_args.config, asked_overrides) == experiment
    assert str(args.workdir) == (asked_args.workdir or str(args.workdir))


def test_every_target_has_an_example() -> None:
    assert {recipe(file)[1] for file in JOBS} == set(TARGETS)


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix in (".sh", ".sbatch")], ids=str)
def test_a_shell_can_read_it(file) -> None:
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "--shell=bash", "--severity=warning", str(file)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_none_holds_a_secret() -> None:
    for file in FILES:
        assert not re.search(r"(?i)(token|password|api_key)\s*[=:]\s*['\"]?\w{6}", file.read_text())
