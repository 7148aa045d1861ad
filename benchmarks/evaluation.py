# SPDX-License-Identifier: Apache-2.0
"""Evaluation metrics beside independent implementations, and retrieval at sizes.

    JAX_PLATFORMS=cpu python benchmarks/evaluation.py            # scikit-learn; scaling
    JAX_PLATFORMS=cpu .venv-torch/bin/python benchmarks/evaluation.py   # and CLIP_benchmark's own

The same random features go through both; the table shows the largest difference of a figure.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import sklearn.linear_model
import sklearn.metrics

from m2jax.eval import probe, retrieval, zero_shot


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Random unit rows."""
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def against_sklearn(seed: int) -> Iterator[tuple[str, float]]:
    """Figure and difference."""
    rng = np.random.default_rng(seed)
    images, weights, labels = unit(rng, 5000, 64), unit(rng, 50, 64), rng.integers(0, 50, 5000)
    scores = images @ weights.T
    found = zero_shot.classification(images, weights, labels)
    for k in (1, 5):
        true = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(50))
        yield f"top-{k}, scikit-learn", abs(found[f"top{k}"].share.value - true)
    balanced = sklearn.metrics.balanced_accuracy_score(labels, scores.argmax(1))
    yield "mean per class, scikit-learn", abs(found["mean_per_class"].share.value - balanced)
    shown = rng.random(scores.shape) < 0.1
    for name, values in (("", scores), (", many ties", np.round(scores * 4) / 4)):
        ours = zero_shot.average_precision(values, shown, np.ones((1, len(values)))).mean()
        true = sklearn.metrics.average_precision_score(shown, values, average="macro")
        yield f"mAP{name}, scikit-learn", abs(ours - true)
    fitted = probe.fit(images, labels, 50, strength=1e-3)
    model = sklearn.linear_model.LogisticRegression(C=1 / (1e-3 * 5000), tol=1e-8, max_iter=5000)
    model.fit(images.astype(np.float64), labels)
    same = (images @ fitted.weights + fitted.bias).argmax(1) == model.predict(images)
    yield "linear probe: share of other answers, scikit-learn", 1 - same.mean()


def against_clip_benchmark(seed: int) -> Iterator[tuple[str, float]]:
    """The same beside CLIP_benchmark's functions, where it and torch are installed."""
    from m2jax.eval import clip_benchmark

    try:
        sys.path.insert(0, ".")
        from tests.checkpoint.convert.torch_toys import torch as torch_with_operators

        torch = torch_with_operators()
        clip_benchmark.register()
    except Exception as error:
        print(f"CLIP_benchmark left out: {error}", file=sys.stderr)
        return
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    rng = np.random.default_rng(seed)
    images, weights, labels = unit(rng, 5000, 64), unit(rng, 50, 64), rng.integers(0, 50, 5000)
    scores = torch.tensor(images @ weights.T)
    found = zero_shot.classification(images, weights, labels)
    theirs = zeroshot_classification.accuracy(scores, torch.tensor(labels), topk=(1, 5))
    for k, value in zip((1, 5), theirs, strict=True):
        yield f"top-{k}, CLIP_benchmark", abs(found[f"top{k}"].share.value - value)
    shown = rng.random(scores.shape) < 0.1
    theirs = zeroshot_classification.average_precision_per_class(scores, torch.tensor(shown))
    ours = zero_shot.average_precision(scores.numpy(), shown, np.ones((1, 5000))).mean()
    yield "mAP, CLIP_benchmark", abs(ours - theirs.mean().item())
    counts = rng.integers(1, 6, 1000)
    pictures, texts = unit(rng, 1000, 64), unit(rng, counts.sum(), 64)
    table = torch.tensor(texts @ pictures.T)
    right = torch.zeros_like(table, dtype=bool)
    right[torch.arange(len(texts)), torch.tensor(np.repeat(np.arange(1000), counts))] = True
    found = retrieval.score(pictures, texts, retrieval.standard([["c"] * n for n in counts]))
    for way, a, b in (("t2i", table, right), ("i2t", table.T, right.T)):
        for k in (1, 5, 10):
            parts = range(0, len(a), 250)
            hits = [
                zeroshot_retrieval.recall_at_k(a[i : i + 250], b[i : i + 250], k) for i in parts
            ]
            value = (torch.cat(hits) > 0).float().mean().item()
            yield f"{way} R@{k}, CLIP_benchmark", abs(found[f"{way}_r{k}"].share.value - value)


def scaling(sizes: list[int], dim: int) -> None:
    """Seconds and memory of one direction of retrieval, and what the full matrix would take."""
    print("\n| queries x items | seconds | peak resident GiB of the process | full matrix GiB |")
    print("|---|---|---|---|")
    for size in sizes:
        rng = np.random.default_rng(size)
        a, b = unit(rng, size, dim), unit(rng, size, dim)
        begin = time.perf_counter()
        retrieval.ranks(a, b, [[i] for i in range(size)])
        took = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {size:,} x {size:,} | {took:.1f} | {peak:.2f} | {4 * size**2 / 2**30:,.1f} |")


def million() -> None:
    """What XLA says one tile of queries against a million items of 768 takes; nothing runs."""
    count, dim, tile = 2**20, 768, retrieval.TILE
    shape = jax.ShapeDtypeStruct
    lowered = retrieval._tiles.lower(
        shape((tile, dim), "float32"),
        shape((count // tile, tile, dim), "float32"),
        shape((tile, 5), "int32"),
        count,
    )
    memory = lowered.compile().memory_analysis()
    print(
        f"\n{count:,} x {count:,} x {dim}: {memory.argument_size_in_bytes / 2**30:.2f} GiB of "
        f"features, {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries "
        f"(the full matrix: {4 * count**2 / 2**40:.1f} TiB)"
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="5000,20000,80000")
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    worst: dict[str, float] = {}
    for seed in range(args.seeds):
        for rows in (against_sklearn(seed), against_clip_benchmark(seed)):
            for name, gap in rows:
                worst[name] = max(worst.get(name, 0.0), gap)
    print("| figure | largest difference |\n|---|---|")
    for name, gap in worst.items():
        print(f"| {name} | {gap:.1e} |")
    million()
    scaling([int(size) for size in args.sizes.split(",")], args.dim)


if __name__ == "__main__":
    main()
