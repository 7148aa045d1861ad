# SPDX-License-Identifier: Apache-2.0
"""``load``: every kind of folder, from here or from the Hub, and nothing that is none."""

import dataclasses
import fnmatch
import sys
import types

import jax
import numpy as np
import pytest

import m2jax
from m2jax import config
from m2jax.checkpoint import folder
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.dist.mesh import make_mesh
from m2jax.models import params as params_lib
from tests.checkpoint.convert import m2_files
from tests.models.dual_toys import TOYS

IDS, MASK = np.array([[7, 3, 5, 1, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: params_lib.initialise(m2_files.MODEL, jax.random.key(1)))()


@pytest.fixture
def model(tmp_path, params):
    """A model folder."""
    directory = tmp_path / "model"
    folder.write(
        directory, m2_files.MODEL, params, tokenizer=None, preprocess=Preprocess(16).to_dict()
    )
    return directory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub whose cache is made of links, as the real one's is.

    Snapshots are called by their commit, and patterns match as the real ones do: ``*`` takes ``/``.
    """
    calls = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, ignore_patterns=()):
        calls.append((repo_id, revision))
        source = tmp_path / repo_id.split("/")[1]
        if not source.is_dir():
            raise ConnectionError("404 Client Error.\n\nRepository Not Found for url: ...")
        cache = tmp_path / "cache" / f"commit-{source.name}"
        for file in source.rglob("*"):
            name = str(file.relative_to(source))
            wanted, unwanted = (
                any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            link = cache / name
            if file.is_file() and wanted and not unwanted and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        return str(cache)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def text_features(bundle):
    return np.asarray(bundle.encode_text(IDS, MASK))


def test_the_hub_holds_model_folders_and_exports(model, hub, tmp_path):
    here = m2jax.load(model)
    m2jax.export(here, tmp_path / "exported")
    for name in ("org/model", "org/exported@v1"):
        there = m2jax.load(f"hf:{name}")
        np.testing.assert_array_equal(text_features(there), text_features(here))
    commit = "commit-exported"  # what follows the first files is of the same state
    assert hub == [("org/model", None), ("org/exported", "v1"), ("org/exported", commit)]


def test_the_hub_is_asked_for_what_is_read_alone(model, hub, tmp_path):
    """Releases hold the same weights several times, and examples, in other files."""
    here, release = m2jax.load(model), tmp_path / "release"
    m2jax.export(here, release)
    others = (
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.safetensors",
        "a.safetensors",
        "a.png",
    )
    for name in others:
        (release / name).parent.mkdir(exist_ok=True)
        (release / name).write_text("not read")
    there = m2jax.load("hf:org/release")
    np.testing.assert_array_equal(text_features(there), text_features(here))
    cache = tmp_path / "cache" / "commit-release"
    assert (cache / "model.safetensors").exists()
    assert not [name for name in others if (cache / name).exists()]


def test_a_hub_release_of_another_file_name_is_found(model, hub, tmp_path):
    here, release = m2jax.load(model), tmp_path / "release"
    m2jax.export(here, release)
    (release / "model.safetensors").rename(release / "m2_encoder.safetensors")
    (release / "onnx").mkdir()
    (release / "onnx" / "half.safetensors").write_text("not read")
    there = m2jax.load("hf:org/release")
    np.testing.assert_array_equal(text_features(there), text_features(here))
    assert not (tmp_path / "cache" / "commit-release" / "onnx").exists()


def test_what_the_hub_cannot_give_is_one_line(hub):
    with pytest.raises(
        UserError, match=r"hf:org/none: .*ConnectionError: 404 Client Error\.\)"
    ) as e:
        m2jax.load("hf:org/none")
    assert "\n" not in str(e.value)
    for name in ("hf:none", "hf:a/b/c", "hf:/b", "hf:"):
        with pytest.raises(UserError, match="write hf:OWNER/NAME"):
            m2jax.load(name)
    assert hub == [("org/none", None)]


def test_without_the_hubs_library_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        m2jax.load("hf:org/name")


def test_a_mesh_spreads_the_parameters(model, tmp_path):
    mesh = make_mesh(config.Mesh(data=1, fsdp=4, model=2))
    single = m2jax.load(model)
    m2jax.export(single, tmp_path / "exported")
    for source in (model, tmp_path / "exported"):
        spread = m2jax.load(source, mesh=mesh)
        kernel = spread.params["backbone"]["blocks"]["A"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 4, 32)
        np.testing.assert_allclose(text_features(spread), text_features(single), atol=1e-6)


def test_precision_is_the_callers_choice(model):
    half = m2jax.load(model, dtype="bfloat16")
    assert half.config.dtype == "bfloat16"
    assert half.params["logit_scale"].dtype == np.float32
    close = np.abs(text_features(half) - text_features(m2jax.load(model))).max()
    assert 1e-5 < close < 0.1


def test_never_random_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"encoder_embed_dim": 16}')
    for path, match in ((tmp_path / "no", "no such directory"), (tmp_path, "holds no weight file")):
        with pytest.raises(UserError, match=match):
            m2jax.load(path)
    for text, match in (("{", "config.json: not JSON"), ("[]", "config.json: holds no JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=match):
            m2jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no checkpoint"):
        m2jax.load(tmp_path)


def test_patch_features_are_the_image_heads_of_the_patch_tokens_in_reading_order(model):
    bundle = m2jax.load(model)
    side, patch = bundle.config.image_size, bundle.config.patch_size
    assert bundle.patch_grid == side // patch
    pixels = np.random.default_rng(0).random((2, side, side, 3), np.float32)
    found = np.asarray(bundle.encode_patches(pixels))
    tokens = np.asarray(bundle.model.encode_image(pixels).vl.tokens)[:, 1:]
    features = tokens @ np.asarray(bundle.params["image_vl_head"]["kernel"])
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, features, atol=2e-6)
    assert found.shape[1] == bundle.patch_grid**2


def test_a_model_of_another_family_has_no_patch_features(model):
    other = dataclasses.replace(m2jax.load(model), config=TOYS["clip"])
    assert other.patch_grid == 0
    with pytest.raises(UserError, match="has no patch features: use an M2-Encoder"):
        other.encode_patches(np.zeros((1, 16, 16, 3), np.float32))


@pytest.mark.parametrize("split", [1, 2])
def test_a_mesh_encodes_the_same_and_gives_it_whole(model, split):
    """Rows that do not divide over its devices, more than one parameter shard, one row."""
    alone = m2jax.load(model)
    shared = m2jax.load(model, mesh=make_mesh(config.Mesh(fsdp=split), jax.devices()[:4]))
    assert alone.mesh is None
    assert shared.mesh is not None
    assert shared.mesh.shape["fsdp"] == split
    side = alone.config.image_size
    pixels = np.random.default_rng(0).random((5, side, side, 3), np.float32)
    for kind in ("encode_image", "encode_patches"):
        for rows in (pixels, pixels[:1]):
            found = getattr(shared, kind)(rows)
            assert found.is_fully_replicated
            assert len(found) == len(rows)
            np.testing.assert_allclose(found, getattr(alone, kind)(rows), atol=2e-6)
    ids, mask = IDS.repeat(3, axis=0), MASK.repeat(3, axis=0)
    ids[1, 1] = 9
    found = shared.encode_text(ids, mask)
    np.testing.assert_allclose(found, alone.encode_text(ids, mask), atol=2e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3
