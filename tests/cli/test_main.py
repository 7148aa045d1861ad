# SPDX-License-Identifier: Apache-2.0
"""The frame of the command line: help, exit codes, error lines, overrides."""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cli import doctor
from m2jax.cli.main import VERBS, build_parser, main, split_overrides
from m2jax.config import UserError

Words = list[str]


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "build", "--help"]])
def test_help_is_quick_and_loads_no_jax(words: Words) -> None:
    code = (
        "import sys; from m2jax.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 1
    assert done.stdout.startswith("usage: m2jax")


def test_every_verb_has_help() -> None:
    listed = build_parser().format_help()
    for verb in VERBS:
        name = verb.__name__.rsplit(".", 1)[1].replace("evaluate", "eval")
        assert re.search(rf"^    {name}\s", listed, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trane"],
        ["train"],
        ["train", "--config", "emoji"],
        ["train", "--conf", "emoji", "--workdir", "x"],  # no abbreviations: flags are a promise
        ["embed", "--model", "m", "--out", "x.npz"],
        ["embed", "--model", "m", "--out", "x.npz", "--images", "a.png", "--texts", "t.txt"],
        ["data", "build", "imagenet"],
        ["doctor", "extra"],
    ],
)
def test_wrong_usage_exits_with_2(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x: bad: mend"), 2, "m2jax: error: x: bad: mend\n"),
        (KeyboardInterrupt(), 130, "m2jax: error: interrupted\n"),
        (
            RuntimeError("one\ntwo"),
            1,
            "m2jax: error: RuntimeError: one (run with --debug for the traceback)\n",
        ),
        (
            AssertionError(),
            1,
            "m2jax: error: AssertionError (run with --debug for the traceback)\n",
        ),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "run", raising(error))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run", raising(UserError("x: bad: mend")))
    assert main(["doctor", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("m2jax: error: x: bad: mend\n")


def test_a_verbs_exit_code_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda args: 42)
    assert main(["doctor"]) == 42


def test_overrides_need_a_verb_with_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config.train.steps=3"]) == 2
    assert "takes no config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "others", "overrides"),
    [
        (["train", "--config.a.b=1"], ["train"], ["a.b=1"]),
        (["train", "--config.a.b", "1", "-x"], ["train", "-x"], ["a.b=1"]),
        (["--config.mesh.data", "-1"], [], ["mesh.data=-1"]),
        (["--config.a=x=y"], [], ["a=x=y"]),
        (["--config.a="], [], ["a="]),
        (["--config.a"], [], ["a"]),
        (["--config", "f.py", "--config.a=1"], ["--config", "f.py"], ["a=1"]),
    ],
)
def test_overrides_are_taken_out(words: Words, others: Words, overrides: Words) -> None:
    assert split_overrides(words) == (others, overrides)


plain = st.text(st.characters(codec="ascii", exclude_characters="="), min_size=1).filter(
    lambda word: not word.startswith("--config.")
)


@given(st.lists(st.one_of(plain, st.tuples(plain, plain, st.booleans()))))
def test_no_word_is_lost(items: list[str | tuple[str, str, bool]]) -> None:
    words: Words = []
    for item in items:
        if isinstance(item, str):
            words.append(item)
        else:
            key, value, joined = item
            words += [f"--config.{key}={value}"] if joined else [f"--config.{key}", value]
    others, overrides = split_overrides(words)
    assert others == [item for item in items if isinstance(item, str)]
    assert overrides == [f"{item[0]}={item[1]}" for item in items if not isinstance(item, str)]


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "m2jax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("m2jax ")


def test_a_pipe_that_breaks_elsewhere_is_an_error_with_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run", raising(BrokenPipeError(32, "a worker is gone")))
    assert main(["doctor"]) == 1
    assert "a worker is gone" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_verb_without_words() -> None:
    code = (
        "import sys; from m2jax.cli import doctor, main\n"
        "doctor.run = lambda args: [print('x' * 100) for _ in range(10**5)] and 0\n"
        "sys.exit(main.main(['doctor']))"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as verb:
        assert verb.stdout is not None
        assert verb.stderr is not None
        verb.stdout.readline()
        verb.stdout.close()
        assert verb.stderr.read() == b""
        assert verb.wait() == 1
