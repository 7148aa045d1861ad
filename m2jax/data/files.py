# SPDX-License-Identifier: Apache-2.0
"""From the config to batches over the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2jax.config import Data, Experiment, Part, UserError
from m2jax.data import glm, stores
from m2jax.data.home import data_home
from m2jax.data.image import Preprocess
from m2jax.data.pairs import ANY, PairBatches, Pairs, caption_languages
from m2jax.data.shards import ShardPairs
from m2jax.data.tars import TarPairs
from m2jax.data.text import SentencePieceTokenizer, Tokenizer, tokenizer_from_dict
from m2jax.data.tfds_pairs import TfdsPairs
from m2jax.data.tsv import TsvPairs


def pair_batches(experiment: Experiment, assets: Mapping[str, Any] | None) -> PairBatches:
    """The batches of ``data.name`` tsv, tars, shards, tfds or mixture.

    Args:
        experiment: the run.
        assets: tokenizer and preprocessing of the model that the run starts from, as checkpoints
            keep them; ``None`` where it starts afresh.

    Raises:
        UserError: files that are missing or damaged, or no tokenizer.
    """
    cfg = experiment.data
    parts = cfg.mixture if cfg.name == "mixture" else (_alone(cfg),)
    if not parts:
        raise UserError("data.mixture: has no parts: give it some, or use data.name=tsv or tars")
    names = [part.name or f"{part.kind}{i}" for i, part in enumerate(parts)]
    if len(set(names)) != len(names):
        raise UserError(f"data.mixture: names {names}: two are equal: change one")
    if assets is None:
        tokenizer = _tokenizer(cfg.tokenizer, experiment.model.max_text_len)
        preprocess = Preprocess(experiment.model.image_size, background="white")
    else:
        tokenizer = tokenizer_from_dict(assets["tokenizer"])
        preprocess = Preprocess.from_dict(assets["preprocess"], experiment.model.image_size)
    at_least = 2 * max(preprocess.size, preprocess.shortest) if cfg.draft else 0
    return PairBatches(
        {name: _open(part, cfg, at_least) for name, part in zip(names, parts, strict=True)},
        [part.weight for part in parts],
        cfg,
        tokenizer=tokenizer,
        preprocess=preprocess,
        seed=experiment.train.seed,
        tags=_tags(experiment),
    )


def _tags(experiment: Experiment) -> tuple[str, ...]:
    """Languages of the caption head, where a row's place does not tell its text's."""
    data, caption = experiment.data, experiment.loss.caption
    tagged = caption.weight > 0 and ANY in data.languages
    return caption_languages(data, caption) if tagged else ()


def _alone(cfg: Data) -> Part:
    """The one source of a run without a mixture."""
    return Part(
        name=cfg.name, kind=cfg.name, files=cfg.files, language=cfg.language, split=cfg.split
    )


def _open(part: Part, cfg: Data, at_least: int) -> Pairs:
    """The pairs of a source."""
    if not part.files:
        raise UserError("data.files: names none: set it to paths or patterns such as data/*.tar")
    if part.kind == "tsv" and any(map(stores.is_remote, part.files)):
        raise UserError(
            f"data.files: {part.files[0]}: a TSV names pictures beside it: pack them with `m2jax "
            "data build shards`, or mount the bucket"
        )
    files = stores.matching(part.files, "data.files", data_home(cfg.dir) / "fetched")
    if part.kind == "tars":
        cache = data_home(cfg.dir) / "indices"
        return TarPairs(files, cache, language=part.language, at_least=at_least)
    if part.kind == "shards":
        return ShardPairs(files, at_least=at_least)
    if part.kind == "tfds":
        return TfdsPairs(files, part.split, language=part.language, at_least=at_least)
    if part.kind != "tsv":
        raise UserError(f"data: kind {part.kind!r}: no such kind: tsv, tars, shards or tfds")
    if len(files) > 1:
        raise UserError(
            f"data.files: {len(files)} TSV files: join them, or use data.name=mixture with a part "
            "for each"
        )
    return TsvPairs(files[0], check=cfg.unreadable == "error", at_least=at_least)


def _tokenizer(path: str, length: int) -> Tokenizer:
    """The tokenizer of a model that starts afresh."""
    if not path:
        raise UserError(
            "data.tokenizer: not given: name a folder with GLM's tokenizer or a .model file, or "
            "start from a model with --init"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        return glm.read(file, length)
    try:
        return SentencePieceTokenizer(file.read_bytes(), length)
    except OSError as error:
        raise UserError(f"data.tokenizer={path}: {error.strerror}: mend the path") from error
