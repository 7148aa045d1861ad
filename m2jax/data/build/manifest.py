# SPDX-License-Identifier: Apache-2.0
"""``manifest.json``: what went in, what became of it, and a checksum of every file."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from m2jax.config import UserError
from m2jax.data.build import plan as plan_lib
from m2jax.data.build import shards, stage_read, stage_score, work
from m2jax.data.build.plan import Plan
from m2jax.data.build.readers.base import Unit

MANIFEST, ASIDE = "manifest.json", "set_aside"
# Counts that are not samples set aside.
_BESIDE = (stage_read.READ, shards.COPIES, stage_score.REWRITTEN)


def write(
    plan: Plan,
    units: Sequence[Unit],
    counts: Mapping[int, Mapping[str, int]],
    stated: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Moves the shards to their place and writes what lies beside them; the manifest last.

    Args:
        plan: the build.
        units: all of them.
        counts: by ordinal, over all stages.
        stated: of the shards.

    Returns:
        The manifest.
    """
    for index, shard in enumerate(stated):
        source = plan.work / "shards" / f"{index:05d}" / str(shard["file"])
        if source.exists():  # else it was moved before a kill
            source.replace(plan.out / str(shard["file"]))
    shards.write_metadata(plan, [dict(shard) for shard in stated])
    aside = _set_aside(plan, units)
    sources = [_source(plan, index, units, counts) for index in range(len(plan.sources))]
    manifest = {
        **plan.settings(),
        "fingerprint": plan_lib.fingerprint(plan),  # of settings and inputs
        "records": sum(shard["records"] for shard in stated),
        "counts": _total(sources),
        "sources": sources,
        "shards": list(stated),
        "set_aside": aside,
    }
    temporary = plan.work / MANIFEST
    work.write_json(temporary, manifest)
    temporary.replace(plan.out / MANIFEST)
    shutil.rmtree(plan.work)
    return manifest


def _source(
    plan: Plan, index: int, units: Sequence[Unit], counts: Mapping[int, Mapping[str, int]]
) -> dict[str, Any]:
    """What went in from one source."""
    source = plan.sources[index]
    total: collections.Counter[str] = collections.Counter()
    for ordinal, unit in enumerate(units):
        if unit.source == index:
            total.update(counts[ordinal])
    total.pop(stage_read.PASSED, None)
    return {
        "name": source.name,
        "kind": source.kind,
        "licence": source.licence,
        "language": source.language,
        "weight": source.weight,
        "evaluation": source.evaluation,
        "files": [source.label(file) for file in source.files],
        "counts": dict(total),
    }


def _total(sources: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of all sources but the evaluation sets."""
    total: collections.Counter[str] = collections.Counter()
    for source in sources:
        if not source["evaluation"]:
            total.update(source["counts"])
    return dict(total)


def _set_aside(plan: Plan, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One file per source of all that is not in the shards; returns their checksums."""
    folder = plan.out / ASIDE
    folder.mkdir(exist_ok=True)
    stated = []
    for index, source in enumerate(plan.sources):
        file = folder / f"{source.name}.jsonl"
        with file.open("wb") as out:
            for ordinal, unit in enumerate(units):
                for stage in ("read", "score", "list") if unit.source == index else ():
                    part = plan.work / stage / f"{ordinal:06d}" / stage_read.SET_ASIDE
                    if part.exists():
                        with part.open("rb") as lines:
                            shutil.copyfileobj(lines, out)
        name = file.relative_to(plan.out).as_posix()
        stated.append({"file": name, "sha256": work.sha256(file)})
    return stated


def read(folder: Any) -> dict[str, Any]:
    """The manifest of a built folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        found = work.read_json(folder / MANIFEST)
        if not isinstance(found["shards"], list) or not isinstance(found["records"], int):
            raise ValueError("it lists no shards")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/{MANIFEST}: {error}: build the shards again") from error
    return found


def summary(manifest: Mapping[str, Any]) -> str:
    """The counts as a table, for the terminal."""
    counts = manifest["counts"]
    reasons = sorted((k for k in counts if k not in _BESIDE), key=lambda k: -counts[k])
    rows = [(stage_read.READ, counts.get(stage_read.READ, 0))]
    rows += [(f"- {reason}", counts[reason]) for reason in reasons]
    rows += [(f"+ {name}", counts[name]) for name in _BESIDE[1:] if name in counts]
    rows += [("records", manifest["records"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {number:>12,}" for name, number in rows)
