# SPDX-License-Identifier: Apache-2.0
"""A build whose low pairs are written anew by our own captioner, from training to shards."""

import dataclasses
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from m2jax.cli import build_models
from m2jax.cli.main import main
from m2jax.data.shards import ShardPairs
from tests.data.build import collections_of as made
from tests.test_captioner import COLOURS, WORDS, trained

pytestmark = pytest.mark.slow


def coloured(name, side=40):
    """A picture of one colour; its size tells it from others of the colour."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), COLOURS[name]).save(out, "PNG")
    return out.getvalue()


def test_low_pairs_get_the_captioners_words(tmp_path, monkeypatch, capsys):
    model = trained(monkeypatch, tmp_path / "model")
    members = []
    for number in range(9):
        name = list(COLOURS)[number % 3]
        members += [
            (f"{number}.png", coloured(name, 40 + number)),
            (f"{number}.en.txt", f"nothing about this picture {number * 977}".encode()),
        ]
    made.write_tar(tmp_path / "a.tar", members)
    words = ["data", "build", "shards", "--out", str(tmp_path / "out"), "--near", "none"]
    words += ["--source", f"a=tars:{tmp_path}/a.tar", "--score-model", str(model)]
    assert main([*words, "--score-below", "1.0", "--score-batch", "4"]) == 0
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts == {"read": 9, "captions rewritten": 9}
    shards = ShardPairs([tmp_path / "out"])
    for row in range(len(shards)):
        record = shards.record(row)
        pixel = np.asarray(shards.read(row).image)[0, 0]
        name = next(n for n, colour in COLOURS.items() if tuple(pixel) == colour)
        (caption,) = record.captions
        assert caption.text == WORDS[name][0]
        assert caption.original.startswith("nothing about")
        assert -1 <= caption.score < 1
        assert dataclasses.astuple(caption)[1] == "en"
    capsys.readouterr()
    # The same by workers that are processes of their own, which load both models anew.
    own = ["--", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    words[4] = str(tmp_path / "other")
    more = ["--score-below", "1.0", "--score-batch", "4"]
    assert main([*words, *more, *own]) == 0
    capsys.readouterr()
    for file in sorted((tmp_path / "out").glob("*.array_record*")):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


MISSING_THERE = """
import os
if os.getpid() != {}:
    raise ImportError("captions are not written on this machine")
def make():
    return None
"""


def test_a_captioner_that_workers_lack_is_one_line(tmp_path, monkeypatch, capsys):
    made.write_tar(tmp_path / "a.tar", made.sample(1))
    (tmp_path / "here_but_not_there.py").write_text(MISSING_THERE.format(os.getpid()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(build_models, "check", lambda model: None)
    words = ["data", "build", "shards", "--out", "out", "--source", "a=tars:a.tar"]
    words += ["--score-model", "nowhere", "--captioner", "here_but_not_there:make"]
    own = ["--", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    assert main([*words, *own]) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if "m2jax: error" in line]
    assert shown == [
        "m2jax: error: --captioner here_but_not_there:make: captions are not written on this "
        "machine: mend MODULE:NAME"
    ]
