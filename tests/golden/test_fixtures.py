# SPDX-License-Identifier: Apache-2.0
"""Fixtures are recognised by what they hold, whatever they are called."""

import json

import numpy as np
import pytest

from tests.golden import fixtures, test_m2_files, test_m2_golden


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, "GOLDEN", tmp_path)
    (tmp_path / "m2").mkdir()
    return tmp_path / "m2"


def found(kind, recognise):
    [*parameters] = fixtures.cases("m2", kind, recognise)
    return [p.id for p in parameters if not p.marks], [
        m.kwargs["reason"] for p in parameters for m in p.marks
    ]


def test_a_kind_that_is_absent_is_skipped_by_name(folder):
    (folder / "notes.txt").write_text("unknown")
    (folder / "other.json").write_text("[1]")
    np.savez(folder / "other.npz", a=np.zeros(1))
    for module in (test_m2_files, test_m2_golden):
        for name in (n for n in dir(module) if n.startswith("is_")):
            ids, reasons = found("strange kind", getattr(module, name))
            assert ids == []
            assert reasons == [f"{folder} holds no strange kind"]
    folder.joinpath("notes.txt").unlink()
    assert found("x", lambda file: True)[0] == ["other", "other"]


def test_files_are_known_by_their_keys(folder):
    np.savez(folder / "q1.npz", in_image=0)
    np.savez(folder / "q2.npz", image_cls_vlffn_feats=0)
    np.savez(folder / "q3.npz", src7_dst9_in=0)
    np.savez(folder / "q4.npz", raw_3x2_to5_uint8_chw=0)
    documents = {
        "q5": {"logit_scale": {"shape": [], "dtype": "float32"}},
        "q6": {"9B": {"total": 1, "tensors": 2}},
        "q7": {"rows": [], "max_length": 9},
    }
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    kinds = [
        test_m2_golden.is_model,
        test_m2_golden.is_double,
        test_m2_files.is_positions,
        test_m2_files.is_preprocess,
        test_m2_files.is_manifest,
        test_m2_files.is_counts,
        test_m2_files.is_tokenizer,
    ]
    assert [found("x", kind)[0] for kind in kinds] == [[f"q{i}"] for i in range(1, 8)]


def test_every_fixture_here_has_a_test():
    """Nothing lies in tests/golden/m2 that no kind reads."""
    kinds = [
        getattr(module, name)
        for module in (test_m2_files, test_m2_golden)
        for name in dir(module)
        if name.startswith("is_")
    ]
    beside = {".safetensors"}  # read with the .npz of the same name
    for file in (fixtures.HERE / "m2").iterdir():
        model = file.with_suffix(".npz")
        partner = model.exists() and test_m2_golden.is_model(model)
        known = any(kind(file) for kind in kinds)
        assert known or (partner and file.suffix in beside | {".json"}), file.name
