# SPDX-License-Identifier: Apache-2.0
"""A run scores itself: with the parameters it has, where they lie, all processes together.

Nothing is read back, so a model that fits no single device, or whose checkpoints lie in parts, is
scored like any other. Every process reads the pictures and asks the same questions in the same
order; each encodes its share of the rows and gets all features; the first one writes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from m2jax import bundle as bundle_lib
from m2jax import captioner as captioner_lib
from m2jax.bundle import Bundle
from m2jax.captioner import Captioner
from m2jax.checkpoint.manager import Saved
from m2jax.config import Experiment, UserError
from m2jax.data import emoji
from m2jax.data.pairs import ANY, LANGUAGES
from m2jax.data.text import Speller
from m2jax.eval.report import write_report
from m2jax.eval.runner import VALIDATION, Evaluation, check, run_suite, table, write_metrics
from m2jax.obs.metrics import read_rows
from m2jax.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class _Beating(Bundle):
    """A model that says of each batch that the run is alive."""

    beat: Callable[[], None]

    def preprocess(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.beat()
        return super().preprocess(images)

    def _rows(self, encode: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
        self.beat()
        return super()._rows(encode, *inputs)


@dataclass(frozen=True)
class Scoring:
    """The evaluations of a run."""

    experiment: Experiment
    saved: Saved  # as its checkpoints have it
    mesh: Mesh
    directory: Path  # for what the first process leaves
    beat: Callable[[int], None]  # tells the watchdog, for each batch, the step that is scored

    def __post_init__(self) -> None:
        """Refuses now what could not be scored at the end.

        Raises:
            UserError: no such suite, or one that needs a data set or asks in other languages, or
                its data are not on this host.
        """
        if suite := self.experiment.eval.suite:
            if other := set(self._languages()).difference(LANGUAGES):
                raise UserError(
                    f"eval.suite={suite}: asks in en and zh, but data.languages has {min(other)}: "
                    "set eval.suite to ''"
                )
            check(suite, self._languages(), None, flag="eval.suite")
            if suite.startswith("emoji"):
                emoji.load(emoji.default_directory(self.experiment.data.dir))

    def _languages(self) -> tuple[str, ...]:
        """Those the suite asks in."""
        named = tuple(name for name in self.experiment.data.languages if name != ANY)
        return named or LANGUAGES

    def validation(self, state: TrainState) -> dict[str, float]:
        """Figures on what tuning may look at; none where the suite has no such part."""
        suite = VALIDATION.get(self.experiment.eval.suite)
        if suite is None:
            return {}
        metrics = self._evaluated(state, suite).metrics
        return {key: value for key, value in metrics.items() if not key.startswith("baseline/")}

    def final(self, state: TrainState) -> None:
        """Runs ``eval.suite`` and leaves ``metrics.json`` and ``report.html``."""
        evaluation = self._evaluated(state, self.experiment.eval.suite)
        if jax.process_index() != 0:
            return
        rows = read_rows(self.directory / "metrics.jsonl")
        seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
        metrics = {**evaluation.metrics, "train/seconds": seconds}
        write_metrics(self.directory / "metrics.json", metrics)
        write_report(self.directory, metrics, evaluation.scored)
        print(table(evaluation.metrics))
        print(f"report: {self.directory / 'report.html'}")

    def model(self, state: TrainState) -> tuple[Bundle, Captioner | None]:
        """What loading a checkpoint of this state would give, around the same arrays."""
        params = state.params if state.ema is None else state.ema
        found = bundle_lib.around(self.saved, params, mesh=self.mesh)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        bundle = _Beating(**parts, beat=functools.partial(self.beat, int(state.step)))
        experiment = self.saved.experiment
        writes = experiment is not None and experiment.loss.caption.weight > 0
        if not (writes and experiment and isinstance(bundle.tokenizer, Speller)):
            return bundle, None
        return bundle, captioner_lib.around(bundle, params, experiment)

    def _evaluated(self, state: TrainState, suite: str) -> Evaluation:
        model, writer = self.model(state)
        cfg = self.experiment
        return run_suite(
            model,
            suite=suite,
            data_dir=cfg.data.dir,
            languages=self._languages(),
            batch_size=cfg.eval.batch_size,
            hold_out_styles=cfg.data.hold_out_styles,
            writer=writer,
        )
