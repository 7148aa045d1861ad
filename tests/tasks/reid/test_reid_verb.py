# SPDX-License-Identifier: Apache-2.0
"""``m2jax reid eval`` on a tiny Market-1501 with a model that sees colours."""

import json

import numpy as np
import pytest
from PIL import Image

from m2jax import bundle
from m2jax.cli.main import main


class Colours:
    """Features are the mean colour."""

    def preprocess(self, images):
        return np.stack([np.asarray(im.convert("RGB").resize((4, 4)), np.float32) for im in images])

    def encode_image(self, pixels):
        return pixels.mean((1, 2)) + 1e-3


@pytest.fixture
def market(tmp_path):
    """Three identities, each a colour, by two cameras; and a distractor near the first."""
    colours = {1: "red", 2: "lime", 3: "blue"}

    def save(folder, name, colour):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (6, 12), colour).save(tmp_path / folder / name)

    for identity, colour in colours.items():
        save("query", f"{identity:04d}_c1s1_000001_00.png", colour)
        save("bounding_box_test", f"{identity:04d}_c1s1_000002_00.png", colour)  # left out
        save("bounding_box_test", f"{identity:04d}_c2s1_000001_00.png", colour)
    save("bounding_box_test", "0000_c3s1_000001_00.png", "#ff0000")
    save("bounding_box_train", "0009_c1s1_000001_00.png", "white")
    return tmp_path


def test_eval(market, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "load", lambda path: Colours())
    words = ["reid", "eval", "--model", "x", "--data", str(market), "--layout", "market1501"]
    assert main([*words, "--batch-size", "2", "--json", str(market / "r.json")]) == 0
    found = json.loads((market / "r.json").read_text())["plain"]
    # A tie with the distractor counts against the first query.
    assert found["map"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["r1"] == pytest.approx(2 / 3)
    assert found["r5"] == 1
    assert "plain: mAP 0.8333" in capsys.readouterr().out
    assert main([*words, "--rerank"]) == 0
    assert "reranked: mAP" in capsys.readouterr().out


def test_bad_words(market, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "load", lambda path: Colours())
    words = ["reid", "eval", "--model", "x", "--data", str(market)]
    assert main([*words, "--layout", "duke"]) == 2
    assert "use one of market1501, cuhk03, msmt17" in capsys.readouterr().err
    assert main([*words, "--layout", "msmt17"]) == 2
    (market / "query" / "0001_c1s1_000001_00.png").write_bytes(b"no picture")
    assert main([*words, "--layout", "market1501"]) == 2
    assert "0001_c1s1_000001_00.png" in capsys.readouterr().err
