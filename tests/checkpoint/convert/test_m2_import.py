# SPDX-License-Identifier: Apache-2.0
"""Official checkpoints in, models out, and back: bit for bit, checked, or refused."""

import jax
import numpy as np
import pytest

import m2jax
from m2jax import config
from m2jax.checkpoint.convert import check, inward, m2_check, m2_inward, place, weights
from m2jax.checkpoint.convert.m2_names import Slot, slots
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.dist.mesh import make_mesh
from m2jax.models import params as params_lib
from tests.checkpoint.convert import m2_files, torch_files


@pytest.fixture(scope="module")
def official():
    return m2_files.tensors()


@pytest.fixture
def release(tmp_path, official):
    return m2_files.release(tmp_path / "release", official)


def imported(folder, arch, **options):
    return inward.read(folder, arch=str(arch), **options)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_in_and_out_again_is_the_same_file(tmp_path, dtype):
    tensors = m2_files.tensors(dtype)
    src, arch = m2_files.release(tmp_path / "release", tensors)
    report = m2jax.convert(src, tmp_path / "model", arch=str(arch), check=dtype == "float16")
    assert report.config.param_dtype == dtype
    assert len(report.checks) == (8 if dtype == "float16" else 0)
    assert all(row.passed for row in report.checks)
    bundle = m2jax.load(tmp_path / "model")
    m2jax.export(bundle, tmp_path / "out", format="m2-torch")
    again = weights.read(tmp_path / "out").content
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].tobytes() == tensor.tobytes(), name
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{sum(t.size for t in tensors.values()):,} parameters, {dtype}" in text


@pytest.mark.slow
def test_out_and_in_again_is_the_same_model(tmp_path):
    """A model of ours, with its own tokenizer and preprocessing, over eight devices."""
    tokenizer = SentencePieceTokenizer(train_tokenizer([f"word{i}" for i in range(40)], 90), 6)
    params = jax.jit(lambda: params_lib.initialise(m2_files.MODEL, jax.random.key(3)))()
    graph = params_lib.abstract(m2_files.MODEL).graph
    bundle = m2jax.Bundle(m2_files.MODEL, graph, params, tokenizer, Preprocess(16, "white"))
    m2jax.export(bundle, tmp_path / "out")
    again = m2jax.load(tmp_path / "out", mesh=make_mesh(config.Mesh(data=1, fsdp=8)))
    rows = m2_files.MODEL.vocab_size
    before, after = params_lib.flatten(params), params_lib.flatten(again.params)
    assert set(before) == set(after)
    for name, array in before.items():
        array = array.at[rows:].set(0) if name == "text_embed" else array  # padding, never read
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    kernel = after["backbone.blocks.A.q.kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 2, 16)
    np.testing.assert_array_equal(again.tokenize(["word3"]).ids, tokenizer(["word3"]).ids)
    assert again.preprocessing == bundle.preprocessing
    m2jax.convert(tmp_path / "out", tmp_path / "in", arch=str(tmp_path / "out" / "config.json"))
    np.testing.assert_array_equal(
        m2jax.load(tmp_path / "in").tokenize(["word3"]).ids, tokenizer(["word3"]).ids
    )


@pytest.mark.parametrize("wrap", ["state_dict", "module", "model"])
def test_torch_files(tmp_path, official, release, wrap):
    prefix = "_forward_module." if wrap == "module" else ""
    content = {prefix + name: torch_files.whole(tensor) for name, tensor in official.items()}
    torch_files.save(tmp_path / "m.ckpt", {"epoch": 1, wrap: content})
    file, arch = release
    ours, theirs = imported(tmp_path / "m.ckpt", arch), imported(file, arch)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_of_deepspeeds_engine(tmp_path, official, release):
    """It saves a set and counters beside ``module``."""
    content = {"_forward_module." + n: torch_files.whole(t) for n, t in official.items()}
    beside = {"sparse_tensor_module_names": set(), "global_steps": 3, "ds_version": "0.16"}
    torch_files.save(tmp_path / "m.pt", {"module": content, **beside})
    file, arch = release
    ours, theirs = imported(tmp_path / "m.pt", arch), imported(file, arch)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_of_a_big_endian_machine(tmp_path, official, release):
    content = {name: torch_files.whole(tensor) for name, tensor in official.items()}
    torch_files.save(tmp_path / "m.ckpt", content, byteorder="big")
    file, arch = release
    ours, theirs = imported(tmp_path / "m.ckpt", arch), imported(file, arch)
    assert ours.config.param_dtype == "float32"
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(row.passed for row in ours.check())


@pytest.mark.parametrize(("held", "wanted"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_one_half_precision_cast_to_the_other_is_checked(tmp_path, held, wanted):
    file, arch = m2_files.release(tmp_path, m2_files.tensors(held))
    rows = imported(file, arch, dtype=wanted).check()
    assert all(row.passed for row in rows)
    assert {row.probe for row in rows if row.limit == np.inf} == {
        "image, rounding included",
        "text, rounding included",
    }


def test_parameters_lie_where_the_mesh_says(release, monkeypatch):
    file, arch = release
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, model=2))
    read, real = [], place._block

    def block(name, *args):
        read.append((name, real(name, *args).shape))
        return real(name, *args)

    monkeypatch.setattr(place, "_block", block)
    spread = params_lib.flatten(imported(file, arch, mesh=mesh).params)
    assert {shape for name, shape in read if name == m2_files.LAYER} == {(8, 32)}  # its own slice
    single = params_lib.flatten(
        imported(file, arch, mesh=make_mesh(config.Mesh(), jax.devices()[:1])).params
    )
    kernel = spread["backbone.blocks.B.fc1.kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 32)
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
    for name, array in single.items():
        assert len(array.devices()) == 1
        np.testing.assert_array_equal(array, spread[name], err_msg=name)


def test_a_cast_rounds_and_says_what_it_costs(release):
    file, arch = release
    half = imported(file, arch, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    rows = half.check()
    assert all(row.passed for row in rows)
    costs = {row.probe: row.max_abs for row in rows if row.limit == np.inf}
    assert set(costs) == {"image, rounding included", "text, rounding included"}
    assert min(costs.values()) > check.LIMIT
    with pytest.raises(UserError, match="float8"):
        imported(file, arch, dtype="float8")


def test_a_file_of_several_types_keeps_the_widest(tmp_path, official):
    mixed = {n: t if "fc1" in n else t.astype(np.float16) for n, t in official.items()}
    file, arch = m2_files.release(tmp_path, mixed)
    assert imported(file, arch).config.param_dtype == "float32"
    wide = official | {"logit_scale": np.array(2.5)}
    file, arch = m2_files.release(tmp_path, wide)
    with pytest.raises(UserError, match="say --dtype float32"):
        imported(file, arch)
    assert imported(file, arch, dtype="float32").config.param_dtype == "float32"
    file, arch = m2_files.release(tmp_path, official | {"norm.bias": np.zeros(16, np.int64)})
    with pytest.raises(UserError, match=r"norm.bias is of type int64"):
        imported(file, arch)


@pytest.mark.slow
def test_the_check_sees_every_tensor(official, release):
    """One official tensor at a time is changed on our side; each change must be seen."""
    file, arch = release
    model = imported(file, arch, mesh=make_mesh(config.Mesh(), jax.devices()[:1]))
    given = m2_check.probes(model.config, None)
    before = m2_check._before(official, model.config, given, None)
    flat = params_lib.flatten(model.params)
    for name, slot in slots(m2_files.MODEL).items():
        array = np.array(flat[slot.name])
        part = array if slot.layer is None else array[slot.layer]
        part[...] = np.roll(part, 1, axis=-1) if part.size > 1 else part + 1
        changed = jax.tree_util.tree_map_with_path(
            lambda path, leaf, slot=slot, array=array: (
                jax.device_put(array, leaf.sharding)
                if params_lib.dotted(path) == slot.name
                else leaf
            ),
            model.params,
        )
        rows = check.compare(before, m2_check._ours(model.config, changed, given))
        # What is added to every key adds the same to all scores of a query: softmax drops it.
        assert all(row.passed for row in rows) == name.endswith(("k_proj.A.bias", "k_proj.B.bias"))


def transposed(slot, tensor, real):
    """A square matrix of one layer the wrong way round."""
    square = slot.name == "vl.blocks.A.out.kernel" and slot.layer == 0
    return tensor if square else real(slot, tensor)


@pytest.fixture
def mistake(request, monkeypatch):
    """A mistake in the mapping of names or axes."""
    if request.param == "transposed":
        real = Slot.inward
        monkeypatch.setattr(Slot, "inward", lambda s, t: transposed(s, t, real))
        return
    a, b = {"A and B": (".A.", ".B."), "q and k": (".q.", ".k.")}[request.param]

    def swapped(cfg):
        places = slots(cfg)
        turn = {a: b, b: a}
        for name, slot in places.items():
            if slot.layer == 1:
                for old, new in turn.items():
                    if old in slot.name:
                        places[name] = slot._replace(name=slot.name.replace(old, new))
                        break
        return places

    monkeypatch.setattr(m2_inward, "slots", swapped)


@pytest.mark.parametrize("mistake", ["transposed", "A and B", "q and k"], indirect=True)
def test_a_mistake_fails_the_check_and_writes_nothing(tmp_path, release, mistake):
    file, arch = release
    with pytest.raises(check.CheckFailed, match="nothing was written") as caught:
        m2jax.convert(file, tmp_path / "model", arch=str(arch))
    assert "FAIL" in check.table(caught.value.rows)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [m2_files.LAYER, "backbone.text_embed.weight"])
def test_bad_numbers_are_refused_by_name(tmp_path, official, value, name):
    bad = official[name].copy()
    bad[-1, -1] = value
    file, arch = m2_files.release(tmp_path, official | {name: bad})
    with pytest.raises(UserError, match=f"{name}: holds NaN or infinity"):
        m2jax.convert(file, tmp_path / "model", arch=str(arch), check=False)
    assert not (tmp_path / "model").exists()


def test_a_number_too_large_for_the_new_type_is_refused(tmp_path, official):
    large = official[m2_files.LAYER] + np.float32(1e5)
    file, arch = m2_files.release(tmp_path, official | {m2_files.LAYER: large})
    with pytest.raises(UserError, match="holds NaN or infinity as float16"):
        imported(file, arch, dtype="float16")


def test_what_is_missing_by_permission_gets_initial_values(tmp_path, official):
    gone = ["pooler.dense.weight", "backbone_vl.layers.0.ffn.B.fc1.weight", "norm.bias"]
    partial = {name: tensor for name, tensor in official.items() if name not in gone}
    file, arch = m2_files.release(tmp_path, partial)
    model = imported(file, arch, allow_missing=["pooler.*", *gone[1:]])
    fresh = params_lib.flatten(params_lib.initialise(model.config, jax.random.key(0)))
    found = params_lib.flatten(model.params)
    for name in ("pooler.kernel", "vl.blocks.B.fc1.kernel"):
        np.testing.assert_allclose(found[name], fresh[name], atol=1e-7)
    np.testing.assert_array_equal(found["norm.scale"], official["norm.weight"])
    assert any(note.startswith("initial values for 3") for note in model.notes)
    probes = {row.probe for row in model.check()}
    assert not {p for p in probes if "unused" in p}
    file, arch = m2_files.release(
        tmp_path, {n: t for n, t in official.items() if n != m2_files.LAYER}
    )
    with pytest.raises(UserError, match=f"{m2_files.LAYER}: the check needs it"):
        imported(file, arch, allow_missing=[m2_files.LAYER]).check()


def test_a_layer_missing_by_permission_leaves_the_others(tmp_path, official):
    file, arch = m2_files.release(
        tmp_path, {n: t for n, t in official.items() if n != m2_files.LAYER}
    )
    model = imported(file, arch, allow_missing=[m2_files.LAYER])
    kernel = params_lib.flatten(model.params)["backbone.blocks.B.fc1.kernel"]
    np.testing.assert_array_equal(kernel[0], official[m2_files.LAYER.replace("1", "0", 1)].T)
    assert np.abs(kernel[1]).max() > 0


def test_the_tokenizer_must_fit(tmp_path, release):
    file, arch = release
    with pytest.raises(UserError, match=r"sp\.model: No such file"):
        imported(file, arch, tokenizer=tmp_path)
    (file.parent / "sp.model").write_bytes(train_tokenizer(["a b c"] * 9, 20))
    with pytest.raises(UserError, match="not GLM's"):
        imported(file, arch)
    (file.parent / "sp.model").unlink()
    for name in (m2_inward.TOKENIZER, m2_inward.PREPROCESS):
        (file.parent / name).write_text("{")
        with pytest.raises(UserError, match=f"{name}: not JSON"):
            imported(file, arch)
        (file.parent / name).unlink()


def test_a_destination_that_exists_is_refused_before_the_work(tmp_path, release):
    file, _ = release
    with pytest.raises(UserError, match="exists already"):
        m2jax.convert(file, tmp_path, arch="no such arch")
    with pytest.raises(UserError, match="exists already"):
        m2jax.export(None, tmp_path)


def test_export_refuses_what_the_release_cannot_hold(tmp_path):
    params = {"logit_scale": np.zeros(())}
    short = config.resolve(config.Model(text_positions=16))
    bundle = m2jax.Bundle(short, None, params, None, Preprocess(16))
    for format, match in (
        ("m2-torch", "the official code builds 1024"),
        ("onnx", "no such format"),
    ):
        with pytest.raises(UserError, match=match):
            m2jax.export(bundle, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []
