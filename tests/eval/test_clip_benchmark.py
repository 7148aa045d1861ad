# SPDX-License-Identifier: Apache-2.0
"""Our models in the real clip-benchmark, and our figures beside its own on the same features."""

import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from m2jax.eval import clip_benchmark, retrieval, suites, zero_shot
from m2jax.eval.sets.records import Place
from tests.checkpoint.convert.torch_toys import torch
from tests.eval.pictures import COLOURS, ColourModel, picture, unit

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def benchmark():
    torch()
    found = pytest.importorskip("clip_benchmark", reason="needs clip-benchmark: make test-torch")
    clip_benchmark.register()
    return found


class Noisy(ColourModel):
    """Features of colours with noise that follows from the input, so no two are alike."""

    def encode_image(self, pixels):
        return noisy(super().encode_image(pixels), [row.tobytes() for row in pixels])

    def encode_text(self, ids, mask):
        texts = [self.texts[i].encode() for i in ids[:, 0]]
        return noisy(super().encode_text(ids, mask), texts)


def noisy(features, contents):
    """Noise that the content alone decides, so both libraries see the same features."""
    rngs = [np.random.default_rng(zlib.crc32(content)) for content in contents]
    return unit(features + np.stack([0.6 * rng.normal(size=3) for rng in rngs]))


def shades(count, seed=0):
    """Pictures near the three colours, no two alike, and what each is near to."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(rng.integers(3))
        pixels = np.asarray(picture(list(COLOURS)[label])).astype(int)
        pixels = np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
        found.append((pixels, label))
    return found


def write_wds(root: Path, kind: str, rows) -> Path:
    """Samples as CLIP_benchmark's own converter writes them."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "dataset_type.txt").write_text(f"{kind}\n")
    from PIL import Image

    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for number, (pixels, label) in enumerate(rows):
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "png")
            members = {"png": encoded.getvalue(), **label}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"s{number:07d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture
def classes_folder(tmp_path):
    rows = [(pixels, {"cls": str(label).encode()}) for pixels, label in shades(90)]
    root = write_wds(tmp_path / "wds", "classification", rows)
    (root / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    prompts = "a photo of {c}\n{c}\nsomething {c}\n"
    (root / "zeroshot_classification_templates.txt").write_text(prompts)
    return root


@pytest.fixture
def captions_folder(tmp_path):
    rng = np.random.default_rng(5)
    rows = []
    for number, (pixels, label) in enumerate(shades(40, seed=2)):
        texts = [f"{list(COLOURS)[label]} number {number}.{i}" for i in range(rng.integers(1, 4))]
        rows.append((pixels, {"txt": "\n".join(texts).encode()}))
    return write_wds(tmp_path / "captions", "retrieval", rows)


def loader(root, loaded, task):
    from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn

    data = build_dataset(
        f"wds/{root}", root=str(root), transform=loaded.transform, split="test", task=task
    )
    collate = image_captions_collate_fn if task == "zeroshot_retrieval" else None
    batches = torch().utils.data.DataLoader(data, batch_size=8, collate_fn=collate)
    return data, batches


def test_zero_shot_equals_its_own(benchmark, classes_folder):
    from clip_benchmark.metrics import zeroshot_classification

    loaded = clip_benchmark.adapted(Noisy())
    data, batches = loader(classes_folder, loaded, "zeroshot_classification")
    expected = zeroshot_classification.evaluate(
        loaded.model,
        _with_classes(batches, data),
        loaded.tokenizer,
        data.classes,
        data.templates,
        "cpu",
        amp=False,
    )
    asked = suites.Request("x", Place(classes_folder), languages=("en",), batch=16)
    found = suites.score(Noisy(), "zero-shot", asked).figures
    top1 = found["zero_shot/x/en/top1"].share.value
    assert 0.4 < top1 < 1  # hard enough to tell mistakes apart
    assert top1 == pytest.approx(expected["acc1"], abs=1e-6)
    mean = found["zero_shot/x/en/mean_per_class"].share.value
    assert mean == pytest.approx(expected["mean_per_class_recall"], abs=1e-6)


def _with_classes(batches, data):
    class Loader:
        dataset = data

        def __iter__(self):
            return iter(batches)

    return Loader()


def test_retrieval_equals_its_own(benchmark, captions_folder):
    from clip_benchmark.metrics import zeroshot_retrieval

    loaded = clip_benchmark.adapted(Noisy())
    _, batches = loader(captions_folder, loaded, "zeroshot_retrieval")
    expected = zeroshot_retrieval.evaluate(
        loaded.model, batches, loaded.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    asked = suites.Request("x", Place(captions_folder), languages=("en",), batch=16)
    found = suites.score(Noisy(), "retrieval", asked).figures
    for k in (1, 5, 10):
        for ours, theirs in (("t2i", "image"), ("i2t", "text")):
            value = found[f"retrieval/x/en/standard/{ours}_r{k}"].share.value
            assert value == pytest.approx(expected[f"{theirs}_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < found["retrieval/x/en/standard/i2t_r5"].share.value < 1


def test_its_functions_on_plain_features(benchmark):
    """Top-k, mAP and recall of random features, function against function."""
    from clip_benchmark.metrics import zeroshot_classification as classification
    from clip_benchmark.metrics import zeroshot_retrieval

    tensor, rng = torch().tensor, np.random.default_rng(0)
    images, weights = (unit(rng.normal(size=(n, 16))) for n in (300, 12))
    labels = rng.integers(0, 12, 300)
    scores = images @ weights.T
    expected = classification.accuracy(tensor(scores), tensor(labels), topk=(1, 5))
    found = zero_shot.classification(images, weights, labels)
    assert found["top1"].share.value == pytest.approx(expected[0], abs=1e-6)
    assert found["top5"].share.value == pytest.approx(expected[1], abs=1e-6)

    shown = rng.random((300, 12)) < 0.2
    theirs = classification.average_precision_per_class(tensor(scores), tensor(shown))
    ours = zero_shot.multi_label(scores, shown)["map"].share.value
    assert ours == pytest.approx(theirs.mean().item(), abs=1e-6)

    counts = rng.integers(1, 6, 120)
    pictures, texts = (unit(rng.normal(size=(n, 16))) for n in (120, counts.sum()))
    table = tensor(texts @ pictures.T)
    right = torch().zeros_like(table, dtype=bool)
    right[torch().arange(len(texts)), tensor(np.repeat(np.arange(120), counts))] = True
    found = retrieval.score(pictures, texts, retrieval.standard([["c"] * n for n in counts]))
    for k in (1, 5, 10):
        for way, a, b in (("t2i", table, right), ("i2t", table.T, right.T)):
            theirs = (zeroshot_retrieval.recall_at_k(a, b, k) > 0).float().mean().item()
            assert found[f"{way}_r{k}"].share.value == pytest.approx(theirs, abs=1e-6)


CLI = """
import sys
from tests.checkpoint.convert.torch_toys import torch
torch()
from m2jax.eval import clip_benchmark
from tests.checkpoint.convert.torch_toys import torch
from tests.eval.pictures import ColourModel
clip_benchmark.load = lambda folder: ColourModel()
sys.exit(clip_benchmark.main())
"""


def test_its_command_line_runs_our_model(benchmark, classes_folder, tmp_path):
    out = tmp_path / "out.json"
    words = ["eval", "--model_type", "m2jax", "--model", "demo", "--pretrained", "runs/demo"]
    words += ["--dataset", "wds/colours", "--dataset_root", str(classes_folder), "--no_amp"]
    words += ["--task", "zeroshot_classification", "--num_workers", "0", "--output", str(out)]
    done = subprocess.run([sys.executable, "-c", CLI, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(out.read_text())["metrics"]["acc1"] == 1
