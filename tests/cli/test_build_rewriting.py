# SPDX-License-Identifier: Apache-2.0
"""A build whose low pairs are written anew by our own captioner, from training to shards."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

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
