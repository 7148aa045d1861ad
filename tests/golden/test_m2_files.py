# SPDX-License-Identifier: Apache-2.0
"""What surrounds the published model: its tensors' names, tokenizer, pictures, position tables."""

import hashlib
import io
import json
import math
import re

import jax
import numpy as np
import pytest
from PIL import Image

import m2jax
from m2jax.architectures import ARCHITECTURES
from m2jax.checkpoint.convert import m2_arch, m2_layout
from m2jax.checkpoint.convert.m2_layout import POSITIONS
from m2jax.data import glm
from m2jax.data.image import Preprocess, open_image
from tests.golden import fixtures

GRIDS = re.compile(r"src(\d+)_dst(\d+)_(.+)")
RESIZED = re.compile(r"(.+)_to(\d+)_uint8_chw")


def is_manifest(file):
    """Shape and type of every tensor of one size."""
    values = fixtures.values(file)
    return isinstance(values, dict) and "logit_scale" in values and "shape" in values["logit_scale"]


def is_counts(file):
    """Numbers of parameters by size and component."""
    values = fixtures.values(file)
    return isinstance(values, dict) and all(
        isinstance(v, dict) and {"total", "tensors"} <= set(v) for v in values.values()
    )


def is_tokenizer(file):
    """Texts with their ids."""
    values = fixtures.values(file)
    return isinstance(values, dict) and {"rows", "max_length"} <= set(values)


def is_positions(file):
    """Position tables before and after a change of grid."""
    return any(GRIDS.fullmatch(key) for key in fixtures.keys(file))


def is_preprocess(file):
    """Pictures before and after preprocessing."""
    return any(key.endswith("_uint8_chw") for key in fixtures.keys(file))


def architecture(shapes):
    """The sizes of a model, from its tensors' shapes alone and one of our named models' heads."""
    layers = {m.groups() for m in (re.match(r"(.+)\.layers\.(\d+)\.", n) for n in shapes) if m}
    depth = {
        p: sum(prefix == p for prefix, _ in layers) for p in ("backbone.encoder", "backbone_vl")
    }
    patches = shapes[POSITIONS][0] - 3
    patch = shapes["backbone.vision_embed.proj.weight"][2]
    return m2_arch.from_official(
        {
            "encoder_embed_dim": shapes["norm.weight"][0],
            "encoder_attention_heads": 1,
            "encoder_layers": depth["backbone.encoder"],
            "beit3_vl_layers": depth["backbone_vl"],
            "out_embed_dim": shapes["itc_text_proj.fc.weight"][0],
            "patch_size": patch,
            "image_size": patch * math.isqrt(patches),
            "vocab_size": shapes["backbone.text_embed.weight"][0],
        },
        "manifest",
    ).model


@pytest.mark.parametrize("file", fixtures.cases("m2", "parameter manifest", is_manifest))
def test_names_and_shapes(file):
    manifest = {name: tuple(entry["shape"]) for name, entry in fixtures.values(file).items()}
    assert m2_layout.shapes(architecture(manifest)) == manifest
    size = file.stem.rpartition("_")[2].lower()
    if f"m2-encoder-{size}" in ARCHITECTURES:
        assert m2_layout.shapes(m2_arch.read(f"m2-encoder-{size}").model) == manifest


def reads(name):
    """Which of the two towers reads a tensor for ``cls_vlffn_feats`` (spec section 3)."""
    if name.startswith(("norm.", "pooler.", "logit_", "itc_image_", "itc_text_")):
        return set()
    if "mask_token" in name or (".B." in name and name.startswith("backbone_vl")):
        return set()
    if name.startswith("backbone_vl"):
        return {"image", "text"}
    image = ".A." in name or "vision_embed" in name or "itc_vl_image" in name
    return {"image"} if image else {"text"}


def count(shapes, component):
    """Parameters of a component as the fixture names them: a prefix, a way, or who reads it."""
    total = {name: math.prod(shape) for name, shape in shapes.items()}
    if component == "total":
        return sum(total.values())
    if component == "tensors":
        return len(total)
    if tower := re.match(r"read_by_(infer_(image|text)|either)", component):
        wanted = {"image", "text"} if tower[1] == "either" else {tower[2]}
        return sum(n for name, n in total.items() if reads(name) & wanted)
    prefix, _, way = component.partition(" (")
    return sum(
        n for name, n in total.items() if name.startswith(prefix) and f".{way[:1]}." in name + ".."
    )


@pytest.mark.parametrize("file", fixtures.cases("m2", "parameter counts", is_counts))
def test_counts(file):
    compared = 0
    for size, components in fixtures.values(file).items():
        name = f"m2-encoder-{size.lower()}"
        if name not in ARCHITECTURES:
            continue
        shapes = m2_layout.shapes(m2_arch.read(name).model)
        for component, expected in components.items():
            assert count(shapes, component) == expected, (size, component)
            compared += 1
    assert compared


@pytest.mark.parametrize("file", fixtures.cases("m2", "position tables", is_positions))
def test_position_tables(file):
    """Within 2e-7: the fixture's averages were summed in another order (spec section 11)."""
    compared = 0
    arrays = fixtures.arrays(file)
    for key, expected in arrays.items():
        match = GRIDS.fullmatch(key)
        if match is None or match[3] == "in":
            continue
        source, rows = arrays[f"src{match[1]}_dst{match[2]}_in"], len(expected)
        content = {
            "lightning": {"state_dict": {POSITIONS: source}},
            "deepspeed": {"module": {f"_forward_module.{POSITIONS}": source}},
        }[match[3]]
        width = source.shape[1]
        keys = {"encoder_embed_dim": width, "encoder_attention_heads": 1, "patch_size": 1}
        cfg = m2_arch.from_official(keys | {"image_size": math.isqrt(rows - 3)}, key).model
        found = m2_layout.official(content, cfg, key, ["*"]).tensors[POSITIONS]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)
        compared += 1
    assert compared


@pytest.mark.parametrize("file", fixtures.cases("m2", "preprocessed pictures", is_preprocess))
def test_preprocessing_to_the_bit(file):
    arrays = fixtures.arrays(file)
    info = json.loads(str(arrays["info_json"])) if "info_json" in arrays else {}
    named = {re.sub(r"\W", "_", name).replace("-", "_"): name for name in info.get("size_wh", {})}
    compared, absent = 0, []
    for key, expected in arrays.items():
        if not key.endswith("_uint8_chw"):
            continue
        stem = key.removesuffix("_uint8_chw")
        if match := RESIZED.fullmatch(key):
            picture = Image.fromarray(arrays[f"{match[1]}_in_hwc"])
        elif (path := fixtures.SHARED / "data" / "pics" / named[stem]).is_file():
            picture = open_image(path)
            raw = np.asarray(picture.convert("RGB"))
            if hashlib.sha256(raw.tobytes()).hexdigest() != info["decoded_rgb_sha256"][named[stem]]:
                absent.append(f"{named[stem]} (decoded otherwise by this libjpeg)")
                continue
        else:
            absent.append(named[stem])
            continue
        [pixels] = Preprocess(expected.shape[1])([picture])
        chw = pixels.transpose(2, 0, 1)
        np.testing.assert_array_equal(chw, expected.astype(np.float32) / 255, err_msg=key)
        if f"{stem}_unit" in arrays:
            np.testing.assert_array_equal(chw, arrays[f"{stem}_unit"], err_msg=key)
        compared += 1
    assert compared or absent
    if not compared:
        pytest.skip(f"pictures not in {fixtures.SHARED.name}/: {', '.join(absent)}")


@pytest.mark.parametrize("file", fixtures.cases("m2", "tokenizer strings", is_tokenizer))
def test_tokenizer(file):
    directory = fixtures.shared("data/m2-tokenizer/sp.model").parent
    values = fixtures.values(file)
    tokenizer = glm.read(directory, values["max_length"])
    texts = [row["text"] for row in values["rows"]]
    assert texts
    ids, mask = tokenizer(texts)
    # The release's retrieval evaluation, and it alone, lower-cases and straightens quotes.
    lower = [text.lower().replace("“", '"').replace("”", '"') for text in texts]
    evaluated = tokenizer(lower).ids
    for index, row in enumerate(values["rows"]):
        assert ids[index].tolist() == row["ids"], row["text"]
        assert mask[index].astype(int).tolist() == row["attention_mask"], row["text"]
        if "ids_after_eval_preprocess" in row:
            assert evaluated[index].tolist() == row["ids_after_eval_preprocess"], row["text"]


# Published (spec section 6): the real weights' probabilities of these texts for pokemon.jpeg.
PIKACHU = {
    "0.4B": [3.3752596e-07, 7.2387557e-08, 2.4727814e-07, 9.9999928e-01],
    "1B": [1.5551204e-06, 4.3255361e-07, 7.5551941e-07, 9.9999726e-01],
    "10B": [6.2423642e-05, 2.7531558e-05, 6.2977582e-05, 9.9984705e-01],
}


@pytest.mark.slow
@pytest.mark.parametrize("size", PIKACHU)
def test_pikachu(size, tmp_path):
    """The release's demo with its own weights, where somebody has put them."""
    weights = fixtures.shared(f"data/m2-weights/m2_encoder_{size}.ckpt")
    tokenizer = fixtures.shared("data/m2-tokenizer/sp.model").parent
    picture = open_image(fixtures.shared("data/pics/pokemon.jpeg"))
    name = f"m2-encoder-{size.lower()}"
    m2jax.convert(weights, tmp_path / name, arch=name, tokenizer=tokenizer)
    bundle = m2jax.load(tmp_path / name)
    image = bundle.encode_image(bundle.preprocess([picture]))
    text = bundle.encode_text(*bundle.tokenize(["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]))
    found = jax.nn.softmax(bundle.logits(image, text), axis=-1)[0]
    np.testing.assert_allclose(found, PIKACHU[size], rtol=2e-3, atol=1e-8)


def test_odd_pictures_are_read_or_refused(tmp_path):
    """A pixel, CMYK, 16 bits, an animation; a bomb is refused before it is decoded."""
    pictures = {
        "one.png": Image.new("RGB", (1, 1), "red"),
        "print.jpg": Image.new("CMYK", (9, 7), (0, 255, 255, 0)),
        "deep.png": Image.fromarray(np.full((5, 6), 65535, np.uint16)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    read = [open_image(tmp_path / name) for name in [*pictures, "moving.gif"]]
    one, printed, deep, moving = Preprocess(4)(read)
    for pixels in (one, printed, moving):  # the first frame
        np.testing.assert_allclose(pixels, np.broadcast_to([1, 0, 0], (4, 4, 3)), atol=0.02)
    np.testing.assert_array_equal(deep, 1)
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    with pytest.raises(m2jax.UserError, match=r"over the limit|unreadable image \(Image size"):
        open_image(tmp_path / "bomb.png")
