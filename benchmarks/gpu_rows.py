# SPDX-License-Identifier: Apache-2.0
"""Tables of benchmarks/gpu.md from the JSONs that benchmarks/gpu.py wrote, each row with its run.

A share of a ceiling is of the rate measured in the same run: the best that a product of 8192 cubed,
or a copy, reached on that card minutes before.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from m2jax.dist.topology import chip_of

EMPTY = "-"
PEERS = {"torch": "PyTorch", "hf": "transformers"}  # by the first word of a part's name
SIZES = ("size", "modality", "pairs", "impl", "form", "ranks", "tile", "wire", "objectives",
         "remat", "attention", "unroll", "fused_qkv", "products", "compile", "stream",
         "kernel", "blocks")  # fmt: skip


class Run(NamedTuple):
    """One JSON."""

    found: dict
    product: float  # FLOP/s in bfloat16, measured; 0 where that part failed
    copy: float  # bytes/s, read and written

    @property
    def where(self) -> str:
        """Date, commit and card, as every row begins."""
        made = self.found
        smoke = " (smoke)" if made.get("smoke") else ""
        return f"{made['date'][:10]} | {made['commit'][:8]} | {made['card']}{smoke}"

    @property
    def datasheet(self) -> float:
        """FLOP/s of the card's datasheet, dense bfloat16; 0 where it is not known."""
        chip = chip_of(self.found["card"])
        return chip.peak_flops if chip else 0.0

    def rows(self, work: str) -> Iterator[tuple[dict, dict]]:
        """(part, row) of the parts whose names begin so."""
        for part in self.found["parts"]:
            if part["name"].startswith(work):
                for row in part["rows"]:
                    yield part, row


def read(found: dict) -> Run:
    """A run with its ceilings."""
    rates = {
        row.get("what"): row.get("flops_per_s") or row.get("bytes_per_s") or 0.0
        for part in found["parts"]
        if part["name"] == "ceilings"
        for row in part["rows"]
    }
    return Run(found, rates.get("bfloat16", 0.0), rates.get("copy", 0.0))


def tables(founds: list[dict]) -> str:
    """Every table, of all runs."""
    runs = [read(found) for found in founds]
    made = [_versions(runs), _ceilings(runs)]
    made += [_table("Training step", TRAIN_HEAD, runs, TRAINING, _train)]
    made += [_table("Encoding", ENCODE_HEAD, runs, ("encode", "torch encode", "hf encode"),
                    _encode)]  # fmt: skip
    made += [_table("Contrastive loss", LOSS_HEAD, runs, ("loss", "torch loss"), _loss)]
    return "\n\n".join([*made, _kernels(runs), _troubles(runs)]) + "\n"


def share(rate: float, ceiling: float) -> str:
    """Per cent, or a dash where the ceiling is not known."""
    return f"{100 * rate / ceiling:.1f} %" if ceiling and rate else EMPTY


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*cells: str) -> str:
    names = ("date", "commit", "card", *cells)
    return _line(*names) + "\n|" + "---|" * len(names)


def what(part: dict, row: dict) -> str:
    """A case in words."""
    who = PEERS.get(part["name"].split()[0], "m2jax")
    kept = [f"{key}={row[key]}" for key in SIZES if row.get(key) not in (None, "")]
    return " ".join([who, *kept, *([part["flags"]] if part.get("flags") else [])])


def _table(title: str, head: tuple, runs: list[Run], parts: tuple, of: Callable) -> str:
    lines = [f"## {title}", "", _head(*head)]
    for run in runs:
        for name in parts:
            for part, row in run.rows(name):
                cells = of(run, part, row) if "error" not in row else None
                if cells:
                    lines.append(_line(run.where, *cells))
    return "\n".join(lines)


TRAINING = ("train", "torch train", "hf train", "forms", "remat", "batches", "flags")  # parts
TRAIN_HEAD = ("what", "rows", "layers", "ms", "pairs/s", "TFLOP/s", "of measured bf16 rate",
              "of datasheet", "GB", "compile s")  # fmt: skip


def _train(run: Run, part: dict, row: dict) -> tuple | None:
    if row.get("kind", "train") != "train" or "seconds" not in row:
        return None
    rate = row["model_flops"] / row["seconds"]
    return (
        what(part, row), row["rows"], row.get("layers", EMPTY), f"{1e3 * row['seconds']:.1f}",
        f"{row['rows'] / row['seconds']:.0f}", f"{rate / 1e12:.4g}", share(rate, run.product),
        share(rate, run.datasheet), f"{row.get('bytes', 0) / 1e9:.1f}",
        f"{row.get('compile_seconds', 0):.0f}",
    )  # fmt: skip


ENCODE_HEAD = ("what", "rows", "ms", "items/s", "TFLOP/s", "of measured bf16 rate",
               "1 - cosine, mean", "worst")  # fmt: skip


def _encode(run: Run, part: dict, row: dict) -> tuple | None:
    if "modality" not in row or "seconds" not in row:
        return None
    rate = row.get("model_flops", 0.0) / row["seconds"]
    return (
        what(part, row), row["rows"], f"{1e3 * row['seconds']:.2f}",
        f"{row['rows'] / row['seconds']:.0f}", f"{rate / 1e12:.4g}" if rate else EMPTY,
        share(rate, run.product),
        *(f"{row[key]:.1e}" if key in row else EMPTY for key in ("mean_off", "most_off")),
    )  # fmt: skip


LOSS_HEAD = ("what", "ms", "temporaries MB", "TFLOP/s of 3 products", "time / roofline")


def _loss(run: Run, part: dict, row: dict) -> tuple | None:
    if "pairs" not in row or "seconds" not in row:
        return None
    least = row["model_flops"] / run.product if run.product else 0.0
    space = row.get("temporaries", row.get("bytes", 0))
    return (
        what(part, row), f"{1e3 * row['seconds']:.1f}", f"{space / 1e6:.0f}",
        f"{row['model_flops'] / row['seconds'] / 1e12:.4g}",
        f"{row['seconds'] / least:.2f}" if least else EMPTY,
    )  # fmt: skip


def _ceilings(runs: list[Run]) -> str:
    lines = ["## Ceilings", "", _head("what", "rate", "ms")]
    for run in runs:
        for _, row in run.rows("ceilings"):
            if "seconds" not in row:
                continue
            made = row.get("flops_per_s")
            rate = f"{made / 1e12:.4g} TFLOP/s" if made else f"{row['bytes_per_s'] / 1e12:.3g} TB/s"
            lines.append(_line(run.where, row["what"], rate, f"{1e3 * row['seconds']:.2f}"))
    return "\n".join(lines)


def _kernels(runs: list[Run]) -> str:
    """The top kernels, each with what the roofline allows it: the longer of FLOPs and bytes."""
    head = ("of", "kernel", "origin", "ms a step", "runs", "of the step", "of its roofline")
    lines = ["## Kernels", "", _head(*head)]
    for run in runs:
        for part, row in run.rows("kernels"):
            for one in row.get("kernels", []):
                best = [one.get("flops", 0) / run.product] if run.product else [0.0]
                best += [one.get("moved", 0) / run.copy] if run.copy else []
                lines.append(
                    _line(
                        run.where, what(part, row), one["kernel"], one.get("origin", EMPTY),
                        f"{1e3 * one['seconds']:.2f}", f"{one.get('runs', 0):g}",
                        f"{100 * one['share']:.1f} %", share(max(best), one["seconds"]),
                    )
                )  # fmt: skip
    return "\n".join(lines)


def _versions(runs: list[Run]) -> str:
    lines = ["## Runs", "", _head("seconds", "versions")]
    for run in runs:
        names = ", ".join(f"{name} {version}" for name, version in run.found["versions"].items())
        lines.append(_line(run.where, run.found.get("seconds", EMPTY), names))
    return "\n".join(lines)


def _troubles(runs: list[Run]) -> str:
    """What failed or was not run, so that no gap in a table is silent."""
    lines = ["## Not measured in these runs", "", _head("part", "what", "why")]
    for run in runs:
        for part in run.found["parts"]:
            if part["status"] != "ok":
                lines.append(_line(run.where, part["name"], part["status"], part.get("error", "")))
            for row in part["rows"]:
                if "error" in row:
                    why = row["error"].replace("|", "/")
                    lines.append(_line(run.where, part["name"], what(part, row), why))
    return "\n".join(lines)
