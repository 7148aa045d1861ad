# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and preprocessing against the libraries' own.

The vocabularies are real where a package holds them: open_clip has CLIP's, cn_clip Chinese-CLIP's.
"""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from m2jax.checkpoint.convert import dual_files
from m2jax.config_dual import Dual, Text
from m2jax.data import hf_text
from m2jax.data.image import Preprocess
from m2jax.data.siglip_text import SiglipTokenizer
from m2jax.data.text import train_tokenizer
from tests.checkpoint.convert import torch_toys
from tests.models.dual_toys import TOYS

pytestmark = pytest.mark.torch

TEXTS = [
    "a photo of a cat",
    "",
    "  Two   DOGS,\tone bird!  ",
    "it's 2024: don't panic... (really)",
    "Ünïcödé naïve café €100 ½",
    "一只红色的猫 and a dog",
    "emoji 😀👍🏽 done",
    "snake_case_name #hashtag @user",
    "word " * 120,
    "x" * 300,
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """``vocab.json`` and ``merges.txt`` of CLIP, from the file that open_clip ships."""
    torch_toys.torch()
    library = pytest.importorskip("open_clip")
    packed = Path(library.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    folder = tmp_path_factory.mktemp("clip")
    encoder = library.tokenizer.SimpleTokenizer().encoder
    special = {"<start_of_text>": hf_text.START_TEXT, "<end_of_text>": hf_text.END_TEXT}
    vocab = {special.get(piece, piece): index for piece, index in encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return folder


def test_clip_as_open_clip_tokenises(clip_folder):
    import open_clip

    made = dual_files.tokenizer(clip_folder, Dual(), "open-clip")
    wanted = open_clip.tokenizer.SimpleTokenizer()(TEXTS).numpy()
    tokens = made(TEXTS)
    np.testing.assert_array_equal(tokens.ids, wanted)
    assert (tokens.ids.argmax(1) == tokens.mask.sum(1) - 1).all()
    assert made.vocab_size == 49408


def test_clip_as_transformers_tokenises(clip_folder):
    import transformers

    made = dual_files.tokenizer(clip_folder, Dual(), "hf")
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    wanted = theirs(TEXTS, padding="max_length", max_length=77, truncation=True)
    tokens = made(TEXTS)
    np.testing.assert_array_equal(tokens.ids, wanted["input_ids"])
    np.testing.assert_array_equal(tokens.mask, np.array(wanted["attention_mask"]) != 0)


@pytest.fixture(scope="module")
def chinese_folder(tmp_path_factory):
    """``vocab.txt`` of Chinese-CLIP, from the file that cn_clip ships."""
    torch_toys.torch()
    library = pytest.importorskip("cn_clip")
    folder = tmp_path_factory.mktemp("chinese")
    vocab = Path(library.__file__).parent / "clip" / "vocab.txt"
    (folder / "vocab.txt").write_bytes(vocab.read_bytes())
    return folder


CHINESE = Dual(
    family="chinese-clip",
    text=Text(vocab_size=21128, positions=512, token_types=2, post_norm=True, causal=False),
)


def test_chinese_clip_as_its_authors_tokenise(chinese_folder):
    import cn_clip.clip as cn

    made = dual_files.tokenizer(chinese_folder, CHINESE, "open-clip")
    tokens = made(TEXTS)
    np.testing.assert_array_equal(tokens.ids, cn.tokenize(TEXTS).numpy())
    np.testing.assert_array_equal(tokens.mask, tokens.ids != 0)
    assert (tokens.ids.shape[1], made.vocab_size) == (52, 21128)


def test_chinese_clip_as_transformers_tokenises(chinese_folder):
    import transformers

    made = dual_files.tokenizer(chinese_folder, CHINESE, "hf")
    theirs = transformers.BertTokenizer.from_pretrained(chinese_folder)
    texts = [*TEXTS, "[MASK] [CLS]"]
    wanted = theirs(texts, padding="max_length", max_length=52, truncation=True)
    np.testing.assert_array_equal(made(texts).ids, wanted["input_ids"])


def test_siglip_as_transformers_tokenises(tmp_path):
    torch_toys.torch()
    import transformers

    model = train_tokenizer(TEXTS[:8] * 3, 150)
    (tmp_path / "spiece.model").write_bytes(model)
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    wanted = theirs(TEXTS, padding="max_length", max_length=16, truncation=True)["input_ids"]
    np.testing.assert_array_equal(SiglipTokenizer(model, 16)(TEXTS).ids, wanted)


@pytest.mark.parametrize("ends", [True, False])
def test_siglip_2_as_transformers_tokenises(tmp_path, ends):
    torch_toys.torch()
    import transformers

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz.,!_"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "ca", "cat"])}
    made = transformers.Siglip2Tokenizer(vocab=vocab, merges=[("c", "a"), ("ca", "t")])
    made.add_eos_token = ends
    made.save_pretrained(tmp_path)
    theirs = transformers.Siglip2Tokenizer.from_pretrained(tmp_path)
    texts = ["A Cat", "cats, and_more!", "", "cat " * 30]
    keywords = {"padding": "max_length", "max_length": 12, "truncation": True}
    wanted = theirs(texts, **keywords, padding_side="right")["input_ids"]
    cfg = dataclasses.replace(
        TOYS["siglip"], text=dataclasses.replace(TOYS["siglip"].text, positions=12)
    )
    np.testing.assert_array_equal(dual_files.tokenizer(tmp_path, cfg, "hf")(texts).ids, wanted)
    assert (np.array(wanted) == 1).any() == ends


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese-clip"])
def test_written_tokenizers_load_in_transformers(tmp_path, clip_folder, chinese_folder, family):
    import transformers

    if family == "siglip":
        made = SiglipTokenizer(train_tokenizer(TEXTS[:8] * 3, 150), 16)
    else:
        source = clip_folder if family == "clip" else chinese_folder
        made = dual_files.tokenizer(source, Dual() if family == "clip" else CHINESE, "hf")
    dual_files.write_tokenizer(tmp_path, made)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == made.max_len
    wanted = theirs(TEXTS, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(made(TEXTS).ids, wanted)


SIZES = [(40, 30), (31, 57), (45, 20), (20, 44), (22, 22), (300, 11)]


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese-clip"])
@pytest.mark.parametrize("config", ["default", "bilinear", "squash"])
def test_preprocessing_as_transformers_on_pil(family, config):
    torch_toys.torch()
    import transformers

    names = {"clip": "CLIP", "siglip": "Siglip", "chinese-clip": "ChineseCLIP"}
    square = {"height": 22, "width": 22}
    given = {"size": square, "do_center_crop": False}
    if config != "squash" and family != "siglip":
        given = {"size": {"shortest_edge": 22}, "crop_size": square, "do_center_crop": True}
    given["resample"] = 2 if config == "bilinear" else 3
    cfg = TOYS[family]
    processor = getattr(transformers, f"{names[family]}ImageProcessorPil")(
        **given, image_mean=list(cfg.vision.mean), image_std=list(cfg.vision.std)
    )
    ours = dual_files.hf_preprocess(given, cfg, "x")
    written = dual_files.hf_preprocess_config(ours, cfg)
    assert dual_files.hf_preprocess(written, cfg, "x") == ours
    pictures = [torch_toys.picture(*size) for size in SIZES]
    for picture in pictures:
        wanted = np.asarray(processor(picture)["pixel_values"][0]).transpose(1, 2, 0)
        pixels = (ours([picture])[0] - np.array(cfg.vision.mean)) / np.array(cfg.vision.std)
        np.testing.assert_allclose(pixels, wanted, atol=2e-6)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_as_open_clip(mode):
    torch_toys.torch()
    library = pytest.importorskip("open_clip")
    cfg = TOYS["clip"]
    steps = library.transform.image_transform(
        22, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode
    )
    ours = dual_files.open_clip_preprocess({"resize_mode": mode}, cfg, "x")
    assert isinstance(ours, Preprocess)
    for size in SIZES:
        picture = torch_toys.picture(*size)
        wanted = steps(picture).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours([picture])[0], wanted, atol=1e-6)
