# SPDX-License-Identifier: Apache-2.0
"""The words of ``m2jax data build shards``: what they become, and how bad ones are refused."""

import dataclasses
import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m2jax.cli import build_models, build_shards
from m2jax.cli.main import build_parser, main
from m2jax.data.build.plan import Duplicates, Scoring
from m2jax.data.build.steps import Limits
from tests.data.build import collections_of as made


def words(tmp_path, *more):
    found = ["data", "build", "shards", "--out", str(tmp_path / "out")]
    return [*found, "--source", f"web=tars:{tmp_path}/web/*.tar", *more]


def planned(tmp_path, *more):
    return build_shards.planned(build_parser().parse_args(words(tmp_path, *more)))


@pytest.fixture(autouse=True)
def collection(tmp_path):
    made.tars(tmp_path / "web", range(12), per_tar=6)


def test_defaults_are_those_of_the_library(tmp_path):
    plan, models = planned(tmp_path)
    assert (plan.limits, plan.duplicates, plan.scoring) == (Limits(), Duplicates(), Scoring())
    assert models.scorer is models.rewriter is None
    flags = {flag.removeprefix("--").replace("-", "_") for flag, *_ in build_shards.LIMITS}
    assert flags == {field.name for field in dataclasses.fields(Limits)}
    flags = {flag.removeprefix("--").replace("-", "_") for flag, *_ in build_shards.DUPLICATES}
    assert flags == {field.name for field in dataclasses.fields(Duplicates)}


def test_sources_with_their_weight_licence_and_language(tmp_path):
    more = ["--source", f"b=coco:{tmp_path}/web/00000.tar,{tmp_path}/web/00006.tar"]
    more += ["--evaluation", f"t=tars:{tmp_path}/web/00006.tar", "--weight", "b=0.5"]
    more += ["--licence", "web=CC0", "--language", "b=zh", "--aspect", "4", "--near", "image"]
    plan, _ = planned(tmp_path, *more, "--seed", "3", "--shard-records", "7")
    web, b, test = plan.sources
    assert [f.name for f in web.files] == [f.name for f in b.files] == ["00000.tar", "00006.tar"]
    assert (web.weight, web.licence, web.language) == (1.0, "CC0", "")
    assert (b.kind, b.weight, b.licence, b.language) == ("coco", 0.5, "unknown", "zh")
    assert (test.evaluation, web.evaluation) == (True, False)
    assert (plan.limits.aspect, plan.duplicates.near, plan.seed) == (4.0, "image", 3)
    assert plan.shard_records == 7


def test_a_build_from_the_shell(tmp_path, capsys):
    assert main(words(tmp_path, "--", "--job_name=mine")) == 0
    shown = capsys.readouterr()
    assert "read" in shown.out
    assert "pass 1 of 1" in shown.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["records"] == 12
    assert main(words(tmp_path)) == 0  # done already: the same table again
    assert capsys.readouterr().out == shown.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "x"], "--source x: write NAME=KIND:FILES"),
        (["--source", "x=zip:a"], "--source x=zip:a: write NAME=KIND:FILES with KIND one of tars"),
        (["--source", "../x=tars:a"], "the name in letters and digits"),
        (["--source", "x=tars:nowhere*.tar"], "--source x: 'nowhere*.tar' matches no file"),
        (["--weight", "y=1"], "--weight y: no such source: name one of ['web']"),
        (["--weight", "web=many"], "--weight web: 'many' is no number"),
        (["--weight", "web=-1"], "weight -1.0: from 0 to 100"),
        (["--", "--runer=SparkRunner"], "Beam knows no option runer: mend it"),
        (["--", "--direct_num_workers=abc"], "-- --direct_num_workers=abc: argument --direct_num"),
        (["--language", "web=de"], "--language web=de: only en and zh are kept"),
        (["stray"], "Beam knows no option stray"),
        (["--aspect", "0"], "--aspect 0.0: must lie between"),
        (["--low-score", "drop"], "no scores to judge by: add --score-model"),
        (["--captioner", "x"], "no scores to judge by: add --score-model"),
        (["--score-model", "x"], "--score-model x: x: no such directory"),
        (
            ["--score-model", "nowhere", "--low-score", "keep"],
            "--score-model nowhere: nowhere: no",
        ),
        (["--score-model", "x", "--captioner", "y"], "--captioner y: y: no such directory"),
        (["--score-model", "x", "--score-batch", "0"], "--score-batch 0: must be at least 1"),
    ],
)
def test_bad_words_are_one_line(tmp_path, more, message, capsys):
    assert main(words(tmp_path, *more)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("m2jax: error") == 1
    assert not (tmp_path / "out").exists()


class FakeBundle:
    """Features that tell rows apart: one-hot by width of the image, by length of the text."""

    def __init__(self):
        self.sizes = []

    def preprocess(self, images):
        return np.array([image.width for image in images])

    def encode_image(self, pixels):
        self.sizes.append(len(pixels))
        return np.eye(50, dtype=np.float32)[pixels]

    def tokenize(self, texts):
        return SimpleNamespace(ids=np.array([len(text) for text in texts]), mask=None)

    def encode_text(self, ids, mask):
        return np.eye(50, dtype=np.float32)[ids]


def test_the_scorer_gives_cosines_of_pairs_in_one_shape(monkeypatch):
    bundle = FakeBundle()
    monkeypatch.setattr(build_models, "_bundle", lambda name: bundle)
    scorer = pickle.loads(pickle.dumps(build_models.Made(build_models.BundleScorer("m", 4))))()
    images = [Image.new("RGB", (width, 1)) for width in (3, 5, 7)]
    np.testing.assert_array_equal(scorer(images, ["abc", "ab", "abcdefg"]), [1, 0, 1])
    assert bundle.sizes == [4]


def test_our_captioner_writes_each_language_it_knows(monkeypatch):
    asked = []

    def captioner(images, *, language):
        asked.append((language, [image.width for image in images]))
        return [f"{language}{image.width}" for image in images]

    captioner.languages = ("en",)
    monkeypatch.setattr(build_models, "_captioner", lambda name: captioner)
    rewriter = build_models.CaptionRewriter("m", 2)
    images = [Image.new("RGB", (width, 1)) for width in (1, 2, 3, 4)]
    assert rewriter(images, ["", "", "", ""], ["en", "zh", "en", "en"]) == ["en1", "", "en3", "en4"]
    assert asked == [("en", [1, 3]), ("en", [4, 4])]


def make_mine():
    return "mine"


def test_a_captioner_of_ones_own(tmp_path, monkeypatch):
    assert build_models.Named(f"{__name__}:make_mine")() == "mine"
    (tmp_path / "here_alone.py").write_text("def make():\n    return 'here'\nnumber = 1")
    (tmp_path / "broken_one.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert build_models.Named("here_alone:make")() == "here"
    for name, why in (
        ("nowhere:x", "No module named 'nowhere'"),
        ("here_alone:none", "has no attribute 'none'"),
        ("here_alone:number", "number is no callable"),
        ("broken_one:x", "division by zero"),
        ("x", "Empty|No module"),
    ):
        message = rf"--captioner {name}: .*({why}).*: mend MODULE:NAME"
        with pytest.raises(build_models.UserError, match=message):
            build_models.Named(name)()
    monkeypatch.setattr("m2jax.captioner.can_write", lambda path: path == "writes")
    monkeypatch.setattr(build_models, "check", lambda model: None)
    plan, models = planned(tmp_path, "--score-model", "writes")
    assert plan.scoring == Scoring("writes", "writes", 0.25, "rewrite", 64)
    assert models.rewriter() == build_models.CaptionRewriter("writes", 64)
    mine = f"{__name__}:make_mine"
    plan, models = planned(tmp_path, "--score-model", "s", "--captioner", mine)
    assert models.rewriter == build_models.Named(mine)
    with pytest.raises(build_models.UserError, match=r"--captioner a\.b:c: No module named 'a'"):
        planned(tmp_path, "--score-model", "s", "--captioner", "a.b:c")
    plan, models = planned(tmp_path, "--score-model", "s", "--low-score", "keep")
    assert (plan.scoring.low, models.rewriter) == ("keep", None)
