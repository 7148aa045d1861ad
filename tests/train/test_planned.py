# SPDX-License-Identifier: Apache-2.0
"""The step that ``m2jax train`` runs is the one that ``m2jax plan`` compiles."""

from pathlib import Path

import jax

from m2jax.dist.topology import CHIPS, Topology
from m2jax.plan import compile as compile_lib
from m2jax.train import main as train_main
from tests.train import toy


def test_train_and_plan_run_the_same_function(monkeypatch, tmp_path: Path) -> None:
    """What ``m2jax train`` jits is what ``plan`` compiles: one function, one program."""
    experiment = toy.experiment(monkeypatch, steps=1)
    seen = []
    assemble = train_main.assemble

    def spy(*args):
        seen.append(assemble(*args))
        return seen[-1]

    monkeypatch.setattr(train_main, "assemble", spy)
    monkeypatch.setattr(compile_lib, "assemble", spy)
    train_main.run(experiment, tmp_path)
    machine = Topology("here", CHIPS["v5e"], tuple(jax.devices()[:2]), 1)
    mesh, task, step = compile_lib.lay_out(experiment, machine)
    (trained, planned) = (one[1].run for one in seen)
    assert planned is step.run
    assert trained.__wrapped__.__code__ is planned.__wrapped__.__code__
    shapes = compile_lib.batch_shapes(task, experiment, mesh)
    texts = {run.lower(step.abstract_state, shapes).as_text() for run in (trained, planned)}
    assert len(texts) == 1
    assert "tf.aliasing_output" in texts.pop()  # the state is donated
