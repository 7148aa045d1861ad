# SPDX-License-Identifier: Apache-2.0
"""The metadata agree, the requirements are portable, and a wheel carries the configs."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import m2jax

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_setup_py_carries_no_metadata() -> None:
    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if type(n) is ast.Call]
    assert len(calls) == 1
    assert not calls[0].args
    assert not calls[0].keywords


@pytest.mark.parametrize("name", ["base.txt", "dev.txt"])
def test_requirements_are_hashed_and_name_no_place(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    pins = re.findall(r"^[\w.\[\]-]+==.*(?:\\\n.*)+", text, re.MULTILINE)
    assert len(pins) > 40
    assert all("--hash=sha256:" in pin for pin in pins)
    assert not re.search(r"^-(?!-hash)|^--|https?://|file:|@ |/\w+/\w", text, re.MULTILINE)
    assert not re.search(r"^(torch|tensorflow)==", text, re.MULTILINE)


def test_requirements_hold_every_dependency() -> None:
    def pinned(name: str) -> set[str]:
        text = (ROOT / "requirements" / name).read_text()
        return {p.lower().replace("_", "-") for p in re.findall(r"^([\w.-]+)", text, re.MULTILINE)}

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[><=]", r)[0].lower().replace("_", "-") for r in requirements}

    project = PYPROJECT["project"]
    assert names(project["dependencies"]) <= pinned("base.txt")
    assert names(project["dependencies"]) <= pinned("dev.txt")
    assert names(project["optional-dependencies"]["dev"]) <= pinned("dev.txt")


def test_a_wheel_holds_code_and_configs_alone(tmp_path: Path) -> None:
    """Built from a copy, so that setuptools leaves no build folder in the tree."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("m2jax", "configs"):
        for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.j2")]:
            copy = source / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.split()[-1]
    assert wheel.name.startswith(f"m2jax-{m2jax.__version__}-")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in inside} == {"m2jax"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "m2jax").rglob("*.py")}
    configs = {f"m2jax/_configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "m2jax").rglob("*.j2")}
    assert len(templates) == 8
    assert inside == modules | configs | templates


def test_every_script_has_the_licence_line() -> None:
    for folder in ("m2jax", "tests", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            first = file.read_text(encoding="utf-8").split("\n", 1)[0]
            assert first == "# SPDX-License-Identifier: Apache-2.0", file
