# SPDX-License-Identifier: Apache-2.0
"""Tables of rows and seeds: walked seed by seed, each finished figure kept and not made again.

A script gives its rows, and a function from a row and a seed to figures; here are the arguments,
the walk, the files and the table that such scripts share.
"""

import argparse
import functools
import hashlib
import json
import statistics
from pathlib import Path

import numpy as np
from code_tree import tree


@functools.cache
def _all_code():
    return tree()


def arguments(about, splits, *, seeds=(0, 1, 2)):
    """A parser of --out, --split, --rows, --seeds and --dry-run; see ``parsed``.

    Args:
        about: the script's docstring.
        splits: by name the rows of each, in the order of the table; the first is the default.
        seeds: those without the flag.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=splits, default=next(iter(splits)))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="(default: all of the split)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--dry-run", action="store_true", help="only show what is there")
    return parser


def parsed(parser, splits):
    """The arguments, with rows that the split has."""
    args = parser.parse_args()
    known = list(splits[args.split])
    args.rows = args.rows or known
    for row in args.rows:
        if row not in known:
            parser.error(f"--rows {row}: {args.split} has {', '.join(known)}")
    return args


def digest(config):
    """Ten letters for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:10]


def run_name(config):
    """What the code of m2jax/ makes of a config is named so."""
    return f"{_all_code()}-{digest(config)}"


def figures(folder, config, make, *, dry=False):
    """Figures by name, read where they were made before by the same code with the same config.

    Args:
        folder: holds the files; one is named by the code of m2jax/ and the config.
        config: all that the figures depend on but the code: row, seed, settings, model.
        make: gives the figures.
        dry: make nothing; ``None`` where there are none.
    """
    file = folder / f"{run_name(config)}.json"
    if file.exists():
        return json.loads(file.read_text())["figures"]
    if dry:
        return None
    found = make()
    _replace(file, lambda to: to.write_text(json.dumps({"config": config, "figures": found})))
    return found


def arrays(folder, config, make):
    """Arrays by name that several rows share, kept in a file.

    Args:
        folder: holds the files.
        config: all that the arrays depend on; ``tree`` of some files is their code.
        make: gives the arrays.
    """
    file = folder / f"arrays-{digest(config)}.npz"
    if not file.exists():
        made = make()
        _replace(file, lambda to: _save(to, made))
    with np.load(file) as found:
        return dict(found)


def walk(args, figures, columns, *, digits=1):
    """Makes what is missing, seed by seed, so that a cut table still compares all rows; prints.

    Args:
        args: of ``parsed``.
        figures: function of a row and a seed; ``None`` where there are none.
        columns: names of the figures that are shown.
        digits: behind the point.
    """
    found = {row: [] for row in args.rows}
    for seed in args.seeds:
        for row in args.rows:
            each = figures(row, seed)
            if each is not None:
                found[row].append(each)
                shown = {name: round(each[name], digits) for name in columns if name in each}
                print(row, seed, shown, flush=True)
    print(table(found, columns, digits=digits), flush=True)


def table(found, columns, *, digits=1):
    """Markdown: of each row mean and standard deviation over its seeds (n - 1 below)."""
    lines = [f"| row | seeds | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for row, there in found.items():
        cells = []
        for name in columns:
            values = [each[name] for each in there if name in each]
            # A row without chance has one value, whatever the seed.
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {row} | {len(there)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _save(file, made):
    with file.open("wb") as opened:
        np.savez(opened, **made)


def _replace(file, write):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    write(temporary)
    temporary.rename(file)
