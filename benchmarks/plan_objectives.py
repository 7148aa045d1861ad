# SPDX-License-Identifier: Apache-2.0
"""What each set of objectives adds to a 10B step, modelled by ``m2jax plan``: time and memory.

    python benchmarks/plan_objectives.py [--folder runs/plans] [--rows itc sycoca m2 ...]
                                         [--dry-run]

All rows: v5p:4x4x8, 16,384 rows a step, everything recomputed; only the losses differ. A plan is
known by the code of m2jax/ and its words, lands as JSON in the folder and is not made again. A plan
compiles the real step: minutes of two free cores and 6 GB each.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from code_tree import tree

GIB = 2**30
ALIKE = ("model.remat=full", "data.batch_size=16384")
SYCOCA = ("loss.caption.weight=2", "loss.masked_image.weight=1")
M2 = ("loss.masked_text.weight=1", "loss.masked_tokens.weight=1")
# A tokenizer of ViT-B's size is our choice; left at 0 its sizes are the encoder's.
SMALL = tuple(
    f"loss.visual_tokenizer.{key}" for key in ("width=768", "heads=12", "encoder_layers=12")
)
ROWS = {
    "itc": (),
    "itc+ic": SYCOCA[:1],
    "sycoca": SYCOCA,
    "sycoca, 2 positions of logits": (*SYCOCA, "loss.caption.positions=2"),
    "itc+cmlm": M2[:1],
    "m2": (*M2, *SMALL),
    "m2, tokenizer as large as the encoder": M2,
}


def place(name: str, folder: Path) -> Path:
    """Where a row's plan lies."""
    text = "\n".join([tree(), *ALIKE, *ROWS[name]])
    return folder / f"objectives-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def make(name: str, folder: Path) -> None:
    """Plans a row unless its JSON is there."""
    file = place(name, folder)
    if file.exists():
        return
    config = ["--config", "configs/pretrain_10b.py:v5p-128", "--topology", "v5p:4x4x8"]
    words = [f"--config.{word}" for word in (*ALIKE, *ROWS[name])]
    command = [sys.executable, "-m", "m2jax", "plan", *config, *words, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{name}: exit {done.returncode}: {last}", file=sys.stderr)


def row(name: str, plan: dict, alone: dict | None) -> str:
    """One line of the table; factors are over ITC alone, where that is there."""

    def times(value: float, of: float | None) -> str:
        return f" ({value / of:.2f} x)" if of else ""

    memory, seconds = plan["bytes_per_chip"], plan["step_seconds"]
    total, limit = memory["total"] / GIB, memory["limit"] / GIB
    base = alone["bytes_per_chip"]["total"] / GIB if alone else None
    cells = [
        name,
        "yes" if plan["fits"] else "NO",
        f"{total:.1f}{times(total, base)} of {limit:.1f}",
        f"{plan['sent_bytes_per_chip'] / GIB:.1f}",
        f"{seconds:.2f}{times(seconds, alone['step_seconds'] if alone else None)}",
        f"{100 * plan['mfu']:.1f} %",
        f"{plan['compile_seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Plans what is missing and prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/plans"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dry-run", action="store_true", help="only print what is there")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        for name in args.rows:
            make(name, args.folder)
    there = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in ROWS
        if (file := place(name, args.folder)).exists()
    }
    print("| objectives | fits | total GiB | sent GiB | step s | MFU | compile s |\n|" + "---|" * 7)
    for name, plan in there.items():
        print(row(name, plan, there.get("itc")))


if __name__ == "__main__":
    main()
