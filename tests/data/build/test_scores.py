# SPDX-License-Identifier: Apache-2.0
"""Scores and what becomes of low ones, with a scorer and a captioner made for the test."""

import dataclasses

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.data.build import manifest, pipeline, stage_score
from m2jax.data.build.plan import Plan, Scoring
from m2jax.data.build.readers.base import Source
from m2jax.data.build.stage_score import Models
from tests.data.build import collections_of as made
from tests.data.build.test_build import aside, files, read


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Scores by the length of the text, and sees that images and texts come in pairs."""

    seen: tuple = ()

    def __call__(self, images=None, texts=None):
        if images is None:
            return self
        assert len(images) == len(texts) <= 4
        return np.array([len(t) / 100 for t in texts], np.float32)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes of the image's size; nothing in Chinese."""

    def __call__(self, images=None, texts=None, languages=None):
        if images is None:
            return self
        told = zip(images, texts, languages, strict=True)
        return [f"a  picture of {i.width} pixels" if said == "en" else "" for i, _, said in told]


def source(tmp_path):
    """Six records: even ones with a long English text, odd ones with a short one."""
    members = []
    for number in range(6):
        text = f"a small thing numbered {number} " * (1 + number % 2)
        members += [
            (f"{number}.png", made.encoded(made.picture(number, 40 + number))),
            (f"{number}.en.txt", text.encode()),
            (f"{number}.zh.txt", f"第{number}个很小的东西在这里".encode()),
        ]
    file = tmp_path / "s.tar"
    if not file.exists():  # its time of change is part of a build
        made.write_tar(file, members)
    return Source("s", "tars", (file,))


def build(tmp_path, low, name="out", models=None):
    scoring = Scoring("model", "captioner", below=0.25, low=low, batch=4)
    plan = Plan(tmp_path / name, (source(tmp_path),), scoring=scoring)
    models = models or Models(Lengths(), Writer())
    return pipeline.build(plan, models=models, say=lambda line: None)


def test_low_captions_are_written_anew_and_the_old_ones_kept_beside(tmp_path):
    found = build(tmp_path, "rewrite")
    records = read(tmp_path / "out")
    assert len(records) == 6
    for record in records:
        number = int(record.key[-1])
        by_language = {c.language: c for c in record.captions}
        english, chinese = by_language["en"], by_language["zh"]
        old = (f"a small thing numbered {number} " * (1 + number % 2)).strip()
        assert english.score == pytest.approx(len(old) / 100, abs=1e-6)
        if number % 2:  # 0.49 and above stays
            assert (english.text, english.original) == (old, "")
        else:
            assert english.text == f"a picture of {40 + number} pixels"
            assert english.original == old
        # Below 0.25, but the captioner writes no Chinese: it stays as it was.
        assert (chinese.original, chinese.score < 0.25) == ("", True)
    assert found["counts"]["captions rewritten"] == 3
    assert found["scoring"]["below"] == 0.25
    build(tmp_path, "rewrite", "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_low_captions_may_be_dropped_or_kept(tmp_path):
    found = build(tmp_path, "drop")
    assert sorted(r.key for r in read(tmp_path / "out")) == [f"s/s.tar#{n}" for n in (1, 3, 5)]
    assert {c.language for r in read(tmp_path / "out") for c in r.captions} == {"en"}
    assert found["counts"] == {"read": 6, "low score": 3, "caption: low score": 3}
    assert [row[:2] for row in aside(tmp_path / "out", "s")] == [
        (f"s/s.tar#{n}", "low score") for n in (0, 2, 4)
    ]
    assert aside(tmp_path / "out", "s")[0][2] == "0.240 at best"
    kept = build(tmp_path, "keep", "kept", Models(Lengths()))
    assert kept["records"] == 6
    assert kept["counts"] == {"read": 6}


class Broken(Lengths):
    def __call__(self, images=None, texts=None):
        return self if images is None else np.full(len(texts), np.nan)


def test_scores_that_are_none_end_the_build_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--score-model: gave no finite score"):
        build(tmp_path, "keep", models=Models(Broken()))
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()
    found = build(tmp_path, "keep", models=Models(Lengths()))  # the rest is not done again
    assert found["records"] == 6


def test_models_and_plan_must_agree(tmp_path):
    with pytest.raises(UserError, match="--low-score rewrite: nothing to write with"):
        build(tmp_path, "rewrite", models=Models(Lengths()))
    with pytest.raises(UserError, match="--score-model: a scorer must come"):
        build(tmp_path, "keep", models=Models(None, Writer()))
    plan = Plan(tmp_path / "x", (source(tmp_path),), scoring=Scoring(low="best"))
    with pytest.raises(UserError, match="--low-score best: unknown"):
        pipeline.build(plan)
    assert stage_score.left(5, []) == [0, 1, 2, 3, 4]


@dataclasses.dataclass(frozen=True)
class Failing:
    """Fails in the worker, as a model that only the first machine has does."""

    kind: type[Exception]

    def __call__(self):
        raise self.kind("--captioner x: no module: mend it")


def test_what_a_worker_says_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--captioner x: no module: mend it$"):
        build(tmp_path, "rewrite", models=Models(Lengths(), Failing(UserError)))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("{}m2jax.config_values.UserError: a: mend{}\n\n"), UserError, "a: mend"),
        (RuntimeError("{}OSError: full{}\n"), RuntimeError, "a worker failed: OSError: full"),
        (RuntimeError("{}MemoryError"), RuntimeError, "a worker failed: MemoryError"),
        (RuntimeError("no slots"), RuntimeError, "no slots"),
        (OSError(28, "disk full"), OSError, "[Errno 28] disk full"),
        (UserError("a: b: mend{1}"), UserError, "a: b: mend"),
        (ValueError(), ValueError, ""),
    ],
)
def test_what_beam_adds_to_an_error_is_taken_off(error, kind, message):
    text = "Traceback (most recent call last):\n  File 'x'\n", " [while running 'score']"
    if "{" in str(error):
        error = type(error)(str(error).format(*text))
    found = pipeline._told(error)
    assert (type(found), str(found)) == (kind, message)
