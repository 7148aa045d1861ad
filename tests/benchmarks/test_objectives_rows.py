# SPDX-License-Identifier: Apache-2.0
"""Rows of the objectives: each starts from the runs it needs, and no run is made twice."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def objectives(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("objectives")


def bench(objectives, out, *, steps=40, dry=False):
    return objectives.Bench(SimpleNamespace(out=out, steps=steps, dry_run=dry))


def test_scores_are_means_over_the_styles_in_per_cent(objectives):
    found = {
        "scenes/fluent/en/mean_recall": 0.2,
        "scenes/openmoji/en/mean_recall": 0.4,
        "scenes/fluent/zh/cider": 0.5,  # of one style alone: no mean
        "scenes/fluent/en/mean_recall_low": 0.1,
    }
    assert objectives.of_styles(found) == {"mean_recall en": pytest.approx(30)}


def test_a_row_makes_what_it_starts_from_and_nothing_twice(objectives, tmp_path, monkeypatch):
    begun = []

    def train(command, **_):
        words = dict(zip(command[4::2], command[5::2], strict=True))
        made, run = json.loads(Path(words["--config"]).read_text()), Path(words["--workdir"])
        begun.append((made["finetune"]["init"], made["loss"]["masked_tokens"]["tokenizer"], run))
        run.mkdir()
        (run / "metrics.json").write_text('{"scenes/fluent/en/cider": 1.0}')
        rates = [{"step": s, "samples_per_s": rate} for s, rate in ((20, 1.0), (40, 640.0))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rates))

    monkeypatch.setattr(objectives, "subprocess", SimpleNamespace(run=train))
    rows = bench(objectives, tmp_path / "out")
    assert bench(objectives, tmp_path / "out", dry=True).figures("m2", 0) is None
    assert rows.figures("m2", 0)["step ms"] == pytest.approx(100)  # the first rate has compilation
    itc, tokenizer, m2 = begun
    assert itc[:2] == ("", "")
    assert tokenizer[:2] == (str(itc[2]), "")
    assert m2[:2] == ("", str(tokenizer[2]))
    rows.figures("m2", 0)
    rows.figures("itc", 0)
    assert len(begun) == 3
    rows.figures("m2", 1)  # from runs of its own seed
    assert [row[:2] for row in begun[3:]] == [
        ("", ""), (str(begun[3][2]), ""), ("", str(begun[4][2]))
    ]  # fmt: skip
    bench(objectives, tmp_path / "out", steps=41).figures("itc", 0)
    assert len(begun) == 7
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = bench(objectives, tmp_path / "elsewhere", dry=True)
    assert moved.figures("m2", 0)["scenes/fluent/en/cider"] == 1
