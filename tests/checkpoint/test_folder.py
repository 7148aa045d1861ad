# SPDX-License-Identifier: Apache-2.0
"""A model folder holds a model whole, or is not there."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import m2jax
from m2jax import config
from m2jax.checkpoint import folder
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.models import params as params_lib

TINY = config.resolve(
    config.Model(
        width=16,
        heads=2,
        out_dim=8,
        vocab_size=60,
        text_positions=16,
        image_size=16,
        max_text_len=6,
    )
)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(train_tokenizer([f"word{i}" for i in range(40)], 60), 6)


@pytest.fixture(scope="module")
def sharded():
    """Random parameters over eight devices."""
    mesh = make_mesh(config.Mesh(data=1, fsdp=4, model=2))
    places = params_lib.shardings(params_lib.abstract(TINY), mesh, AxisRules())
    init = jax.jit(lambda: params_lib.initialise(TINY, jax.random.key(3)), out_shardings=places)
    return init()


def write(directory, params, tokenizer):
    saved = tokenizer.to_dict() if tokenizer else None
    folder.write(directory, TINY, params, tokenizer=saved, preprocess=Preprocess(16).to_dict())


@pytest.mark.parametrize("spread", [False, True])
def test_load_gives_back_what_was_written(tmp_path, sharded, tokenizer, spread, caplog):
    write(tmp_path / "model", sharded, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    mesh = make_mesh(config.Mesh(data=1, fsdp=8)) if spread else None
    bundle = m2jax.load(tmp_path / "model", mesh=mesh)
    assert bundle.config.width == 16
    loaded = params_lib.flatten(bundle.params)
    for name, array in params_lib.flatten(sharded).items():
        np.testing.assert_array_equal(loaded[name], array)
    kernel = bundle.params["backbone"]["blocks"]["A"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == ((2, 2, 16) if spread else (2, 16, 16))
    ids, mask = bundle.tokenize(["word1", ""])
    np.testing.assert_array_equal(ids, tokenizer(["word1", ""]).ids)
    features = np.asarray(bundle.encode_text(ids, mask))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_a_parameter_may_be_larger_than_what_is_written_at_a_time(tmp_path, sharded, monkeypatch):
    """At 10B one stack of layers has 5.6 GB; Orbax refuses arrays over its limit."""
    monkeypatch.setattr(folder, "CHUNK_BYTES", 1000)
    write(tmp_path / "model", jax.device_put(sharded, jax.devices()[0]), None)
    loaded = m2jax.load(tmp_path / "model").params
    np.testing.assert_array_equal(loaded["text_embed"], sharded["text_embed"])
    assert loaded["text_embed"].nbytes > 100 * 1000
    files = [p for p in (tmp_path / "model" / "state" / "params.text_embed").iterdir()]
    assert len(files) > 100


def test_without_a_tokenizer_only_tokenize_is_refused(tmp_path, sharded):
    write(tmp_path / "model", sharded, None)
    bundle = m2jax.load(tmp_path / "model")
    assert bundle.encode_image(np.zeros((1, 16, 16, 3), np.float32)).shape == (1, 8)
    with pytest.raises(UserError, match="no tokenizer"):
        bundle.tokenize(["a"])


def test_what_is_there_is_never_replaced(tmp_path, sharded, tokenizer):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "model", sharded, tokenizer)
    with pytest.raises(UserError, match="make it first"):
        write(tmp_path / "no" / "model", sharded, tokenizer)
    assert [p.name for p in tmp_path.rglob("*")] == ["model"]


def test_a_failed_write_leaves_nothing(tmp_path, sharded, tokenizer, monkeypatch):
    def full(self, directory, *args, **options):
        (directory / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "save", full)
    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "model", sharded, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_part_of_a_parameter_is_told(tmp_path, sharded, monkeypatch):
    """Orbax raises a bare error then; by hand, as it also leaves its event loops open."""

    def missing(*args, **options):
        raise Exception("Encountered error while reading array index\nmore")

    write(tmp_path / "model", sharded, None)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", missing)
    with pytest.raises(UserError, match=r"parameters cannot be read \(Encountered .* index\)"):
        m2jax.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, "no JSON object"),
        ({"assets": None}, "lacks its config or its assets"),
        ({"config": 5}, "lacks its config or its assets"),
        ({"assets": {"tokenizer": None}}, "lacks tokenizer or preprocess"),
        ({"config": "[" * 200_000}, "not a JSON file"),
        ({"width": 2**40}, r"model.width=1099511627776: must lie between 1 and 16,777,216"),
        ({"width": -16}, r"model.width=-16: must lie between 1 and"),
        ({"vl_layers": 10**9}, "between 1 and 512"),  # would take all memory to list them
        ({"text_positions": 2**40}, "between 1 and 16,777,216"),
        ({"image_size": 2**20}, "between 1 and 8,192"),
        ({"heads": 3}, "model.width=16: not a multiple of .*model.heads=3"),
        ({"max_text_len": 1023}, "has room for"),
        ({"name": "gpt"}, "no such architecture"),
        ({"assets": {"tokenizer": {"kind": ["glm"]}, "preprocess": {"size": 16}}}, "unknown"),
        ({"assets": {"tokenizer": 5, "preprocess": {"size": 16}}}, "unknown"),
        ({"assets": {"tokenizer": None, "preprocess": {"size": 10**9}}}, "none of a model of 16"),
    ],
)
def test_a_hostile_folder_is_one_error(tmp_path, sharded, change, match):
    write(tmp_path / "model", sharded, None)
    file = tmp_path / "model" / "bundle" / "metadata"
    values = json.loads(file.read_text())
    if change is not None and not set(change) & set(values):  # of the model's own sizes
        config = json.loads(values["config"])
        config["model"] |= change
        change = {"config": json.dumps(config)}
    file.write_text(json.dumps([] if change is None else values | change))
    with pytest.raises(UserError, match=match):
        m2jax.load(tmp_path / "model")
