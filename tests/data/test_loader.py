# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m2jax.config import Mesh, UserError
from m2jax.config_files import load_config
from m2jax.data import loader
from m2jax.data.image import Preprocess, open_image
from m2jax.data.text import (
    SentencePieceTokenizer,
    tokenizer_from_dict,
    train_tokenizer,
)
from m2jax.dist.mesh import make_mesh


class Counting:
    """A source whose batches are their own index."""

    assets = {}  # noqa: RUF012

    def batch(self, index, rows):
        return {"x": np.arange(8)[rows] + 100 * index}


@given(before=st.integers(0, 5), after=st.integers(1, 5), prefetch=st.integers(0, 3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_restored_loader_goes_on_exactly(before, after, prefetch):
    mesh = make_mesh(Mesh())
    one = loader.Loader(Counting(), mesh, 8, prefetch)
    for _ in range(before):
        next(one)
    state = one.get_state()
    two = loader.Loader(Counting(), mesh, 8, prefetch)
    two.set_state(state)
    for step in range(after):
        a, b = np.asarray(next(one)["x"]), np.asarray(next(two)["x"])
        np.testing.assert_array_equal(a, b)
        assert a[0] == 100 * (before + step)
    one.close()
    two.close()


class Ordered(Counting):
    """A source whose batches of n are every n of the numbers from 0 on."""

    by_place = True

    def __init__(self, size):
        self.size = size

    def batch(self, index, rows):
        return {"x": np.arange(self.size)[rows] + self.size * index}


@given(taken=st.integers(0, 9), before=st.sampled_from((8, 16, 24)), after=st.sampled_from((8, 16)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_another_batch_size_takes_up_where_the_rows_ended_or_is_refused(taken, before, after):
    mesh = make_mesh(Mesh())
    one, two = (loader.Loader(Ordered(n), mesh, n, 1) for n in (before, after))
    for _ in range(taken):
        next(one)
    one.close()
    if taken * before % after:
        with pytest.raises(UserError, match=f"began with {before}, and {taken * before} rows"):
            two.set_state(one.get_state())
        return
    two.set_state(one.get_state())
    assert np.asarray(next(two)["x"])[0] == taken * before
    two.close()


def test_another_batch_size_is_refused_where_the_order_depends_on_it():
    mesh = make_mesh(Mesh())
    state = loader.Loader(Counting(), mesh, 16, 1).get_state()
    with pytest.raises(UserError, match="the order depends on it"):
        loader.Loader(Counting(), mesh, 8, 1).set_state(state)


def test_what_was_counted_goes_on(monkeypatch):
    mesh, state = make_mesh(Mesh()), {"next_index": 3, "counts": {"a": 5, "skipped": 2}}
    source = Counting()
    monkeypatch.setattr(source, "parts", ("a", "b"), raising=False)
    found = loader.Loader(source, mesh, 8, 1)
    found.set_state(state)
    assert found.counts == {"a": 5, "skipped": 2}
    assert found.get_state() == {**state, "batch_size": 8}


def test_unknown_sets_and_batches_that_do_not_divide_are_refused():
    cfg = load_config("emoji")
    mesh = make_mesh(Mesh())
    bad = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="laion"))
    with pytest.raises(UserError, match=r"data\.name='laion'"):
        loader.make_loader(bad, mesh)
    bad = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=12))
    with pytest.raises(UserError, match="does not divide over 8"):
        loader.make_loader(bad, mesh)


@pytest.mark.parametrize(
    ("rows_of", "fits"),
    [
        ({0: [(0, 4)], 1: [(4, 8)]}, True),
        ({0: [(4, 6), (6, 8)], 1: [(0, 2), (2, 4)]}, True),  # a mesh may order hosts otherwise
        ({0: [(0, 8)], 1: [(0, 8)]}, False),  # one shard, two processes (model axis across hosts)
        ({0: [(0, 4), (0, 4), (4, 6)], 1: [(4, 6), (6, 8), (6, 8)]}, False),
    ],
)
def test_a_shard_of_rows_lies_in_one_process(monkeypatch, rows_of, fits):
    class Device:
        def __init__(self, process):
            self.process_index = process

    class Places:
        def devices_indices_map(self, shape):
            return {Device(p): (slice(*rows),) for p, held in rows_of.items() for rows in held}

    monkeypatch.setattr(loader, "batch_sharding", lambda mesh: Places())
    refused = pytest.raises(UserError, match="do not lie whole in 2 processes")
    with contextlib.nullcontext() if fits else refused:
        loader._refuse_shared_rows(make_mesh(Mesh()), 8)


TEXTS = ["red apple", "green apple", "红苹果", "青苹果", "cat", "猫"]


def tokenizer():
    return SentencePieceTokenizer(train_tokenizer(TEXTS, 60), 8)


def test_tokens_begin_end_and_pad():
    tokens = tokenizer()(["red apple", "", "cat " * 50])
    assert (tokens.ids[:, 0] == 2).all()
    assert tokens.mask[1].sum() == 2
    assert tokens.mask[2].all()
    assert tokens.ids[2, -1] == 3
    assert (tokens.ids[~tokens.mask] == 0).all()


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_tokenizes(text):
    tokens = TOKENIZER([text])
    assert tokens.ids.max() < TOKENIZER.vocab_size
    length = tokens.mask[0].sum()
    assert tokens.ids[0, length - 1] == 3


TOKENIZER = tokenizer()


def test_training_is_deterministic_and_case_and_width_fold():
    assert train_tokenizer(TEXTS, 60) == train_tokenizer(TEXTS, 60)
    a, b = TOKENIZER(["RED Ａpple", "red apple"]).ids
    np.testing.assert_array_equal(a, b)


def test_a_saved_tokenizer_comes_back_and_damage_is_refused():
    saved = TOKENIZER.to_dict()
    again = tokenizer_from_dict(saved)
    np.testing.assert_array_equal(again(TEXTS).ids, TOKENIZER(TEXTS).ids)
    for damaged in ({**saved, "kind": "bpe"}, {**saved, "model": "AAAA"}, {"kind": saved["kind"]}):
        with pytest.raises(UserError, match="tokenizer"):
            tokenizer_from_dict(damaged)


def test_preprocess_is_pils_own_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
    np.testing.assert_array_equal(Preprocess(16)([image])[0], expected)


def test_transparency_is_dropped_or_put_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert Preprocess(4, "drop")([clear])[0, 0, 0].tolist() == [1, 0, 0]
    assert Preprocess(4, "white")([clear])[0, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "I;16", "LA", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (5, 9))
    assert Preprocess(4, "white")([image]).shape == (1, 4, 4, 3)


def test_hostile_files_are_one_line(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.new("RGB", (40, 40), "red").save(good)
    assert open_image(good).size == (40, 40)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name)
    monkeypatch.setattr("m2jax.data.image.PIXEL_LIMIT", 100)
    with pytest.raises(UserError, match="over the limit"):
        open_image(good)
