# SPDX-License-Identifier: Apache-2.0
"""One process of a fault test: ``m2jax`` itself, on rows made of their numbers, with faults.

    python -m tests.multiprocess.worker train --config ... --workdir DIR

Every batch that a step takes leaves its sample ids in ``DIR/ids-PROCESS.jsonl``, with the step (for
a run on a store in ``M2JAX_NOTES`` instead of ``DIR``):
what the tests compare to find a sample that came twice or never. ``M2JAX_FAULT`` is a JSON list of
faults (``Fault``).
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from m2jax.checkpoint.manager import Checkpoints
from m2jax.cli.main import main as m2jax_main
from m2jax.data import loader as loader_lib
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.eval import runner
from m2jax.train import main as train_main
from m2jax.train import scoring


@dataclasses.dataclass(frozen=True)
class Fault:
    """What befalls a process, and when.

    ``kind``: ``kill`` (SIGKILL), ``term`` (SIGTERM to itself), ``usr1``, ``orphan`` (SIGKILL to the
    processes that prepare its batches), ``stall`` (the step's batch never comes), ``slow`` (every
    step from this one on takes ``after`` seconds longer), ``full`` (files may not grow past
    ``bytes``, as on a full disk). ``step``: the number of the step that is about to begin; with
    ``saving``, that whose save has started.
    """

    kind: str
    step: int
    process: int = -1  # -1: every one
    saving: bool = False
    after: float = 0.0  # seconds later, from a thread
    bytes: int = 0

    def strike(self) -> None:
        """Does it, now or later."""
        if self.after:
            threading.Timer(self.after, self._now).start()
        else:
            self._now()

    def _now(self) -> None:
        if self.kind == "stall":
            time.sleep(3600)
        elif self.kind == "orphan":
            workers = multiprocessing.active_children()
            assert workers, "nobody to kill"
            for worker in workers:
                worker.kill()
        elif self.kind == "full":
            # Writing past the limit fails with EFBIG where SIGXFSZ is ignored, which Python does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, resource.RLIM_INFINITY))
        else:
            number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
            os.kill(os.getpid(), number[self.kind])


ATTEMPT = int(os.environ.get("M2JAX_ATTEMPT", "0"))  # how often this run was started before
FAULTS = [Fault(**fields) for fields in json.loads(os.environ.get("M2JAX_FAULT", "[]"))]


def strike(step: int, *, saving: bool) -> None:
    """The faults of this process at this point."""
    for fault in FAULTS:
        if fault.process not in (-1, jax.process_index()) or fault.saving != saving:
            continue
        if fault.kind == "slow" and step >= fault.step:
            time.sleep(fault.after)
        elif fault.step == step:
            fault.strike()


class Rows:
    """Batches whose every row is made from its sample id, ``index * batch_size + row``."""

    def __init__(self, experiment, assets=None):
        self.cfg = experiment
        words = [f"word{i}" for i in range(40)]
        tokenizer = SentencePieceTokenizer(train_tokenizer(words, 60), 6)
        self.assets = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": Preprocess(16, "white").to_dict(),
        }

    def batch(self, index, rows):
        ids = index * self.cfg.data.batch_size + np.arange(self.cfg.data.batch_size)[rows]
        samples = [self.sample(int(number)) for number in ids]
        batch = {key: np.stack([s[key] for s in samples]) for key in samples[0]}
        return batch | {"concept": ids.astype(np.int32)}

    def sample(self, number):
        rng = np.random.default_rng(number)
        texts = (len(self.cfg.data.languages), self.cfg.model.max_text_len)
        return {
            "image": rng.integers(0, 256, (self.cfg.data.views, 16, 16, 4), np.uint8),
            "text": rng.integers(4, 60, texts, np.int32),
            "text_mask": np.ones(texts, np.bool_),
        }


class RecordingLoader:
    """A loader that writes down what the steps take from it."""

    def __init__(self, inner, workdir: Path):
        self._inner = inner
        self._file = (workdir / f"ids-{jax.process_index()}.jsonl").open("a")
        self.step = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __next__(self):
        batch = next(self._inner)
        self.step += 1
        mine = {n for s in batch["concept"].addressable_shards for n in s.data.tolist()}
        row = {"step": self.step, "attempt": ATTEMPT, "ids": sorted(mine)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        strike(self.step, saving=False)
        return batch


def features(model, setting):
    """A suite: five pictures and two texts, whose cosines are the figures."""
    rng = np.random.default_rng(7)
    images = model.encode_image(rng.random((5, 16, 16, 3), np.float32))
    texts = model.encode_text(*model.tokenize(["word1 word2", "word3"]))
    cosines = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    return runner.Evaluation({f"cosine/{n}/top1": float(c) for n, c in enumerate(cosines.flat)}, [])


def install(workdir: Path) -> None:
    """Puts the rows, the record and the faults where ``m2jax train`` will find them."""
    loader_lib.SOURCES["rows"] = Rows
    runner.SUITES["rows"] = features
    runner.VALIDATION["rows"] = "rows"
    scoring.write_report = lambda *_: None  # it shows drawings
    make_loader, restore, save = train_main.make_loader, Checkpoints.restore, Checkpoints.save
    made = []

    def make(experiment, mesh, assets=None):
        made.append(RecordingLoader(make_loader(experiment, mesh, assets), workdir))
        return made[-1]

    def restored(self, *args, **kwargs):
        found = restore(self, *args, **kwargs)
        if found is not None and made:
            made[-1].step = found.step
        return found

    def saved(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        strike(step, saving=True)

    train_main.make_loader = make
    Checkpoints.restore = restored
    Checkpoints.save = saved


if __name__ == "__main__":
    folder = Path(os.environ.get("M2JAX_NOTES") or sys.argv[sys.argv.index("--workdir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    install(folder)
    sys.exit(m2jax_main(sys.argv[1:]))
