# SPDX-License-Identifier: Apache-2.0
"""Preprocessing and tokenizer files of releases, in the forms they have been written in."""

import json

import pytest

from m2jax.checkpoint.convert import dual_files, json_files
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.data.siglip_text import SiglipTokenizer
from m2jax.data.text import train_tokenizer
from tests.models.dual_toys import TOYS

SQUARE = {"height": 22, "width": 22}


@pytest.mark.parametrize(
    ("family", "config", "wanted"),
    [
        ("clip", {}, Preprocess(22, shortest=22)),
        ("siglip", {}, Preprocess(22)),
        ("chinese-clip", {}, Preprocess(22)),
        # openai/clip-vit-base-patch32 in its first form, and in today's
        ("clip", {"size": 22, "crop_size": 22, "do_center_crop": True, "resample": 3},
         Preprocess(22, shortest=22)),
        ("clip", {"size": {"shortest_edge": 24}, "crop_size": SQUARE}, Preprocess(22, shortest=24)),
        # google/siglip2-base-patch16-224, OFA-Sys/chinese-clip-vit-base-patch16
        ("siglip", {"size": SQUARE, "resample": 2}, Preprocess(22, resample="bilinear")),
        ("chinese-clip", {"size": SQUARE, "do_center_crop": False}, Preprocess(22)),
        ("chinese-clip", {"size": SQUARE, "do_center_crop": True, "crop_size": 22}, Preprocess(22)),
    ],
)  # fmt: skip
def test_preprocessor_configs(family, config, wanted):
    assert dual_files.hf_preprocess(config, TOYS[family], "x") == wanted
    written = dual_files.hf_preprocess_config(wanted, TOYS[family])
    assert dual_files.hf_preprocess(written, TOYS[family], "x") == wanted


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"do_normalize": None}, "do_normalize=None"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 7}, "resample=7"),
        ({"resample": [3]}, "resample"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"size": {"longest_edge": 22}}, "size"),
        ({"size": {"height": 22, "width": 30}}, "equal height and width"),
        ({"size": "22"}, "expected one number"),
        ({"size": 22, "do_center_crop": False}, "takes 22 x 22"),
        ({"size": {"height": 30, "width": 30}, "crop_size": 22}, "takes 22 x 22"),
        ({"crop_size": 20}, "gives images of 20 pixels"),
        ({"size": 20, "crop_size": 22}, "shorter side 20 below the square 22"),
    ],
)
def test_other_pixels_than_the_model_takes_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        dual_files.hf_preprocess(config, TOYS["clip"], "preprocessor_config.json")


def test_open_clip_preprocessing():
    read, clip = dual_files.open_clip_preprocess, TOYS["clip"]
    assert read({}, clip, "x") == Preprocess(22, shortest=22, cut="even")
    squash = {"resize_mode": "squash", "interpolation": "bilinear"}
    made = read(squash, clip, "x")
    assert made == Preprocess(22, resample="bilinear")
    assert dual_files.open_clip_preprocess_config(made) == squash
    for wrong in ({"resize_mode": "longest"}, {"interpolation": "random"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            read(wrong, clip, "x")
    with pytest.raises(UserError, match="no group of keys"):
        read(["squash"], clip, "x")


def test_siglip_reads_spiece_model_by_the_rules_of_each_library(tmp_path):
    model = train_tokenizer(["a red cat", "two dogs"] * 3, 40)
    (tmp_path / "spiece.model").write_bytes(model)
    for layout, underscore in (("hf", ""), ("open-clip", " ")):
        made = dual_files.tokenizer(tmp_path, TOYS["siglip"], layout)
        assert (made.underscore, made.max_len, made.model) == (underscore, 10, model)
    assert dual_files.tokenizer(tmp_path, TOYS["clip"], "hf") is None  # spiece.model is not CLIP's


def test_a_tokenizer_is_written_with_its_length(tmp_path):
    made = SiglipTokenizer(train_tokenizer(["a red cat", "two dogs"] * 3, 40), 10)
    dual_files.write_tokenizer(tmp_path, made)
    assert (tmp_path / "spiece.model").read_bytes() == made.model
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 10
    assert settings["padding_side"] == "right"


def test_a_model_without_a_tokenizer_writes_no_file(tmp_path):
    dual_files.write_tokenizer(tmp_path, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 200_000])
def test_damaged_json_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json"):
        json_files.read(tmp_path / "config.json")
    assert json_files.read(tmp_path / "absent.json") == {}
