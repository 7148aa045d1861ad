# SPDX-License-Identifier: Apache-2.0
"""Where grouped aggregation can save time: arithmetic for the M2-Encoder paper's cluster.

    python benchmarks/contrastive_model.py

256 A100 in 32 nodes of 8, 128 pairs on each, features of 1,024 in float32, groups of one node. A
step is the towers (forward, backward, one recomputed forward), plus the loss, plus its bytes
between nodes; nothing overlaps, and gradients of the parameters, equal for all, are left out.
Modelled: no such machine was at hand.
"""

NODES, PER_NODE, ROWS, DIM = 32, 8, 128, 1024
TOWER_FLOPS_PER_S = 0.5 * 312e12  # bfloat16 peak at 50 %
LOSS_FLOPS_PER_S = 0.5 * 156e12  # TF32
HBM_BYTES_PER_S = 0.8 * 1.6e12
LINKS = {"8 x 200 Gb/s": 200e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.1e9}  # per node, bytes/s

# Forward FLOPs of a pair: image branch (spec of the release) and 52 text tokens through the other.
PAIR = {
    "0.4B": 35e9 + 2 * 52 * 0.085e9,
    "1B": 123e9 + 2 * 52 * 0.30e9,
    "10B": 1919e9 + 2 * 52 * 4.83e9,
}


def matrix_seconds(rows, columns, passes, products=3):
    """Logits [rows, columns]: forward and two backward products, and float32 passes over them."""
    flops = products * 2 * rows * columns * DIM
    return flops / LOSS_FLOPS_PER_S + passes * 4 * rows * columns / HBM_BYTES_PER_S


def loss_seconds(kind):
    """Of one GPU's arithmetic; every pass over the logits reads or writes them once."""
    batch, group = NODES * PER_NODE * ROWS, PER_NODE * ROWS
    if kind == "naive":  # the whole matrix on every GPU, softmax over rows and columns
        return matrix_seconds(batch, batch, passes=10)
    columns = {"local": batch, "grouped": group}[kind]
    return 2 * matrix_seconds(ROWS, columns, passes=5)  # own rows in each direction


def bytes_between_nodes(kind):
    """Into one node: both modalities' features of the others, and their gradients where they go."""
    others = (NODES - 1) * PER_NODE * ROWS * DIM * 4 * 2
    return {"naive": others, "local": 2 * others, "grouped": 0}[kind]


def main():
    """Prints the table."""
    names = "model, link of a node, towers ms, naive ms, local ms, grouped ms, naive / grouped"
    names = [*names.split(", "), "local / grouped"]
    print("|", " | ".join(names), "|\n" + "|---" * len(names) + "|")
    for model, flops in PAIR.items():
        towers = 4 * flops * ROWS / TOWER_FLOPS_PER_S
        for link, speed in LINKS.items():
            step = {
                kind: towers + loss_seconds(kind) + bytes_between_nodes(kind) / speed
                for kind in ("naive", "local", "grouped")
            }
            times = " | ".join(f"{1e3 * t:.0f}" for t in (towers, *step.values()))
            gains = " | ".join(
                f"+{100 * (step[kind] / step['grouped'] - 1):.1f} %" for kind in ("naive", "local")
            )
            print(f"| {model} | {link} | {times} | {gains} |")


if __name__ == "__main__":
    main()
