# SPDX-License-Identifier: Apache-2.0
"""One's own files as batches, hostile ones included."""

import dataclasses
import itertools
import pickle
import tarfile

import numpy as np
import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.data import image, tars
from m2jax.data.files import pair_batches
from m2jax.data.loader import Loader
from m2jax.data.pairs import caption_languages
from m2jax.data.tars import TarPairs
from m2jax.data.tsv import TsvPairs
from m2jax.dist.mesh import make_mesh
from tests.data import own_files

ALL = slice(0, 8)


def test_pictures_and_texts_of_a_row_belong_together(tmp_path):
    source = own_files.batches({"own": TsvPairs(own_files.write_tsv(tmp_path, 20))})
    for index in (0, 1, 7):
        batch = source.batch(index, ALL)
        assert batch["image"].shape == (8, 1, 16, 16, 4)
        assert batch["image"].dtype == np.uint8
        for row in range(8):
            number = own_files.number_of(batch["image"][row])
            assert number == batch["concept"][row]
            expected = own_files.TOKENIZER([f"thing {number}", f"东西 {number}"])
            np.testing.assert_array_equal(batch["text"][row], expected.ids)
            np.testing.assert_array_equal(batch["text_mask"][row], expected.mask)


def test_the_pixels_are_those_of_the_models_preprocessing(tmp_path):
    file = own_files.write_tsv(tmp_path, 1)
    rng = np.random.default_rng(0)
    noise = image.Image.fromarray(rng.integers(0, 256, (50, 30, 4), np.uint8), "RGBA")
    noise.save(tmp_path / "0.png")
    cfg = config.Data(batch_size=1, views=2)
    batch = own_files.batches({"own": TsvPairs(file)}, cfg).batch(0, slice(0, 1))
    seen = image.Preprocess(16, "white")([image.open_image(tmp_path / "0.png")])
    for view in range(2):
        np.testing.assert_array_equal(batch["image"][0, view, ..., :3] / np.float32(255), seen[0])
    assert (batch["image"][..., 3] == 255).all()


def joined(samples):
    return list(itertools.chain.from_iterable(samples))


def mixed(tmp_path, **data):
    """Two sources: numbers below 100 from a TSV, those from 100 on from tars."""
    english = TsvPairs(own_files.write_tsv(tmp_path / "en", 30))
    members = [own_files.sample(100 + n) for n in range(20)]
    files = [own_files.write_tar(tmp_path / f"{k}.tar", joined(members[k::2])) for k in range(2)]
    chinese = TarPairs(files, tmp_path / "cache", language="en")
    cfg = config.Data(batch_size=8, **data)
    return own_files.batches({"en": english, "zh": chinese}, cfg, weights=[3, 1])


def test_processes_share_the_global_batch(tmp_path):
    source = mixed(tmp_path)
    for index in (0, 3):
        whole = source.batch(index, ALL)
        for processes in (2, 4):
            share = 8 // processes
            slices = [slice(p * share, (p + 1) * share) for p in range(processes)]
            parts = [source.batch(index, rows) for rows in slices]
            for key, value in whole.items():
                np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), value)
    assert [int((source.batch(i, ALL)["part"] == 1).sum()) for i in range(5)] == [2] * 5


def test_an_epoch_shows_every_row_once(tmp_path):
    source = mixed(tmp_path)
    numbers = np.concatenate([source.batch(i, ALL)["concept"] for i in range(15)])
    english = numbers[numbers < 30]  # rows of the TSV come first
    np.testing.assert_array_equal(np.sort(english[:30]), range(30))
    np.testing.assert_array_equal(np.sort(english[30:60]), range(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_goes_on_with_other_workers(tmp_path, workers):
    mesh = make_mesh(config.Mesh())
    source = mixed(tmp_path)
    one = Loader(source, mesh, 8, 2, workers=workers, device_prefetch=1)
    expected = [source.batch(index, ALL) for index in range(5)]
    for index in range(3):
        found = next(one)
        assert set(found) == {"image", "text", "text_mask", "concept"}
        for key, value in found.items():
            np.testing.assert_array_equal(np.asarray(value), expected[index][key])
    state = one.get_state()
    assert one.counts == {"en": 18, "zh": 6, "skipped": 0}
    one.close()
    two = Loader(source, mesh, 8, 1, workers=2 - workers)
    two.set_state(state)
    for index in (3, 4):
        np.testing.assert_array_equal(np.asarray(next(two)["concept"]), expected[index]["concept"])
    two.close()


def test_an_error_in_a_worker_keeps_its_one_line(tmp_path):
    source = mixed(tmp_path)
    (tmp_path / "en" / "3.png").write_bytes(b"no image")
    loader = Loader(pickle.loads(pickle.dumps(source)), make_mesh(config.Mesh()), 8, 2, workers=1)
    with pytest.raises(UserError, match=r"data\.tsv:5: .*3\.png: unreadable image"):
        list(itertools.islice(loader, 6))
    loader.close()


def test_unreadable_rows_are_passed_over_and_counted_or_end_the_run(tmp_path):
    file = own_files.write_tsv(tmp_path, 10)
    (tmp_path / "4.png").write_bytes(own_files.encoded(4)[:40])
    (tmp_path / "7.png").unlink()
    with pytest.raises(UserError, match=r"data\.tsv:9: no image '7\.png'.*1 of 10 rows"):
        TsvPairs(file)
    lenient = config.Data(batch_size=8, unreadable="skip")
    source = own_files.batches({"own": TsvPairs(file, check=False)}, lenient)
    rows = [source.batch(i, ALL) for i in range(5)]  # four epochs
    numbers = np.concatenate([r["concept"] for r in rows])
    assert set(numbers) == set(range(10)) - {4, 7}
    assert sum(int(r["skipped"].sum()) for r in rows) == 8
    assert [own_files.number_of(i) for r in rows for i in r["image"]] == list(numbers)
    strict = own_files.batches({"own": TsvPairs(file, check=False)})
    with pytest.raises(UserError, match=r"data\.tsv:(6|9): "):
        [strict.batch(i, ALL) for i in range(2)]


def test_a_source_without_a_readable_row_stops(tmp_path):
    file = own_files.write_tsv(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("x")
    cfg = config.Data(batch_size=8, unreadable="skip")
    with pytest.raises(UserError, match="100 rows of own in a row"):
        own_files.batches({"own": TsvPairs(file)}, cfg).batch(0, ALL)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "first line must name path"),
        ("en\tzh\n", "first line must name path"),
        ("path\n0.png\n", "first line must name path"),
        ("path\ten\ten\n", "first line must name path"),
        ("path\ten\n0.png\ta\tb\n", r"data\.tsv:2: 3 fields"),
        ("path\ten\n0.png\ta\n9.png\tb\n", r"data\.tsv:3: no image '9\.png'.*1 of 2 rows"),
        (b"path\ten\n0.png\t\xff\n", "no TSV file in UTF-8"),
    ],
)
def test_a_bad_tsv_is_one_line(tmp_path, text, match):
    file = own_files.write_tsv(tmp_path, 1)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=match) as caught:
        TsvPairs(file)
    assert "\n" not in str(caught.value)


def test_a_row_without_a_language_is_named_and_any_takes_what_there_is(tmp_path):
    file = own_files.write_tsv(tmp_path, 2)
    file.write_text("path\ten\tzh\n0.png\tthing 0\t \n1.png\t\t东西 1\n")
    cfg = config.Data(batch_size=2)
    with pytest.raises(UserError, match=r"row [01] of own: has no text in '(en|zh)'"):
        own_files.batches({"own": TsvPairs(file)}, cfg).batch(0, slice(0, 2))
    cfg = dataclasses.replace(cfg, languages=("any",))
    batch = own_files.batches({"own": TsvPairs(file)}, cfg).batch(0, slice(0, 2))
    texts = own_files.TOKENIZER(["thing 0", "东西 1"]).ids
    np.testing.assert_array_equal(batch["text"][:, 0], texts[batch["concept"]])
    assert "language" not in batch


def test_a_caption_head_is_told_the_language_of_each_text(tmp_path):
    file = own_files.write_tsv(tmp_path, 2)
    file.write_text("path\ten\tzh\n0.png\tthing 0\t \n1.png\t\t东西 1\n")
    cfg = config.Data(batch_size=2, languages=("any",))
    assert caption_languages(cfg, config.Caption()) == ("en", "zh")
    tagged = {"tags": caption_languages(cfg, config.Caption(languages=("fr", "zh", "en")))}
    batch = own_files.batches({"own": TsvPairs(file)}, cfg, **tagged).batch(0, slice(0, 2))
    np.testing.assert_array_equal(batch["language"][:, 0], np.array([2, 1])[batch["concept"]])
    with pytest.raises(UserError, match=r"row 1 of own: has a text in 'zh', which .* no tag for"):
        own_files.batches({"own": TsvPairs(file)}, cfg, tags=("en",)).batch(0, slice(0, 2))


def tar_pairs(tmp_path, members, name="a.tar"):
    file = own_files.write_tar(tmp_path / name, members)
    return TarPairs([file], tmp_path / "cache", language="zh")


def test_every_kind_of_text_is_read(tmp_path):
    png = own_files.encoded
    members = [
        ("d/a.PNG", png(1)),
        ("d/a.txt", " 猫 \n".encode()),
        ("d/b.webp", own_files.encoded(2, "webp")),
        ("d/b.en.txt", b"dog"),
        ("d/b.json", b'{"zh": "\xe7\x8b\x97", "width": 5}'),
        ("d/alone.png", png(3)),
        ("d/note.txt", b"no image"),
        ("e/a.jpg", own_files.encoded(4, "jpeg")),
        ("e/a.txt", b"x"),
    ]
    pairs = tar_pairs(tmp_path, members)
    assert [dict(pairs.read(i).texts) for i in range(len(pairs))] == [
        {"zh": "猫"},
        {"en": "dog", "zh": "狗"},
        {"zh": "x"},
    ]
    assert pairs.read(0).image.getpixel((0, 0)) == (1, 7, 100)


def test_hostile_tars_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.tar").write_text("no tar " * 200)
    for name, data, match in (
        ("text.tar", None, "no plain tar"),
        ("gone.tar", None, "No such file"),
        ("empty.tar", [("a.txt", b"x")], "holds no image"),
    ):
        if data is not None:
            own_files.write_tar(tmp_path / name, data)
        with pytest.raises(UserError, match=match) as caught:
            TarPairs([tmp_path / name], tmp_path / "cache", language="en")
        assert "\n" not in str(caught.value)
    bad = {"a.json": (b"[1]", "damaged .json"), "a.txt": (b"\xff", "damaged .txt")}
    for name, (data, match) in bad.items():
        pairs = tar_pairs(tmp_path, [("a.png", own_files.encoded(1)), (name, data)], name + ".tar")
        with pytest.raises(UserError, match=match):
            pairs.read(0)
    monkeypatch.setattr(tars, "TEXT_BYTES", 3)
    pairs = tar_pairs(tmp_path, [("a.png", own_files.encoded(1)), ("a.txt", b"long")], "l.tar")
    with pytest.raises(UserError, match=r"\.txt of 4 bytes: over the limit"):
        pairs.read(0)
    monkeypatch.setattr(image, "PIXEL_LIMIT", 100)
    pairs = tar_pairs(tmp_path, own_files.sample(1), "bomb.tar")
    with pytest.raises(UserError, match=r"sample 0 \(\.png\): 20 x 24 pixels: over the limit"):
        pairs.read(0)


def test_members_are_no_paths(tmp_path):
    """Names that climb out, and links to files outside, give nothing but their own bytes."""
    secret = tmp_path / "secret.png"
    own_files.picture(9).save(secret)
    names = ("../../up", "link", "hard")
    members = [("../../up.png", own_files.encoded(1)), *((f"{n}.txt", b"x") for n in names)]
    file = own_files.write_tar(tmp_path / "t" / "a.tar", members)
    with tarfile.open(file, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = {p for p in tmp_path.rglob("*") if tmp_path / "t" / "cache" not in (p, p.parent)}
    pairs = TarPairs([file], tmp_path / "t" / "cache", language="en")
    assert len(pairs) == 1
    assert own_files.number_of(np.asarray(pairs.read(0).image)) == 1
    after = {p for p in tmp_path.rglob("*") if tmp_path / "t" / "cache" not in (p, p.parent)}
    assert after == before


def test_a_tar_that_is_cut_off_is_told_at_once(tmp_path):
    file = own_files.write_tar(tmp_path / "a.tar", joined(own_files.sample(n) for n in range(9)))
    data = file.read_bytes()
    file.write_bytes(data[: 512 * 3 + 20])
    with pytest.raises(UserError, match=r"a\.tar: (cut off|no plain tar)"):
        TarPairs([file], tmp_path / "cache", language="en")


def test_an_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    file = own_files.write_tar(tmp_path / "a.tar", own_files.sample(1))
    cache = tmp_path / "cache"
    assert len(TarPairs([file], cache, language="en")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_index", None)  # not called again
        assert len(TarPairs([file], cache, language="en")) == 1
    own_files.write_tar(file, own_files.sample(1) + own_files.sample(2))
    assert len(TarPairs([file], cache, language="en")) == 2
    for saved in cache.glob("*.npz"):
        saved.write_bytes(saved.read_bytes()[:50])
    assert len(TarPairs([file], cache, language="en")) == 2


def experiment(**data):
    base = config.Experiment(data=config.Data(batch_size=4, **data))
    return dataclasses.replace(base, model=config.resolve(base.model))


def test_the_config_opens_files(tmp_path):
    own_files.write_tsv(tmp_path / "a", 4)
    own_files.write_tar(tmp_path / "b" / "x.tar", own_files.sample(50) + own_files.sample(51))
    (tmp_path / "t.model").write_bytes(own_files.TOKENIZER.model)
    mixture = (
        config.Part(name="a", kind="tsv", files=(str(tmp_path / "a" / "*.tsv"),)),
        config.Part(name="b", kind="tars", files=(str(tmp_path / "b" / "*.tar"),), weight=3),
    )
    cfg = experiment(name="mixture", mixture=mixture, tokenizer=str(tmp_path / "t.model"))
    source = pair_batches(dataclasses.replace(cfg), None)
    assert source.parts == ("a", "b")
    assert np.bincount(source.batch(0, slice(0, 4))["part"]).tolist() == [1, 3]
    again = config.from_json(config.to_json(cfg))
    assert again == cfg


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"name": "tsv"}, "data.files: names none"),
        ({"name": "tsv", "files": ("/nowhere/*.tsv",)}, "matches no file"),
        ({"name": "mixture"}, "has no parts"),
        (
            {"name": "mixture", "mixture": (config.Part(), config.Part(name="tsv0"))},
            "two are equal",
        ),
    ],
)
def test_a_bad_config_is_one_line(data, match, tmp_path):
    (tmp_path / "t.model").write_bytes(own_files.TOKENIZER.model)
    with pytest.raises(UserError, match=match):
        pair_batches(experiment(tokenizer=str(tmp_path / "t.model"), **data), None)
    file = own_files.write_tsv(tmp_path, 4)
    with pytest.raises(UserError, match=r"data\.tokenizer: not given"):
        pair_batches(experiment(name="tsv", files=(str(file),)), None)


def test_a_draft_is_smaller_close_and_never_below_what_was_asked(tmp_path):
    at = np.linspace(0, 6, 400)
    wave = (np.sin(at)[:, None] * np.cos(at[:300]) + 1) * 127
    pixels = np.stack([wave, wave[::-1], 255 - wave], -1).astype(np.uint8)
    image.Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    whole = image.open_image(tmp_path / "a.jpg")
    draft = image.open_image(tmp_path / "a.jpg", at_least=64)
    assert (whole.size, draft.size) == ((300, 400), (75, 100))
    assert image.open_image(tmp_path / "a.jpg", at_least=80).size == (150, 200)
    assert image.open_image(tmp_path / "a.jpg", at_least=301).size == (300, 400)
    a, b = (np.asarray(image.Preprocess(32).square(each), int) for each in (whole, draft))
    assert np.abs(a - b).mean() < 2
