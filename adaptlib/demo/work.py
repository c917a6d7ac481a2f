"""One unit of `make`, in a process of its own: train, score, write."""

import os
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptlib.demo.units import MAX_LENGTH, Unit

if TYPE_CHECKING:
    from adaptlib.training.run import Progress
    from adaptlib.training.tasks import Task

CHECKPOINT_EVERY = 60.0  # seconds
SAY_EVERY = 120.0  # seconds
SPLITS = ("valid", "test")

_parent = 0  # whose death ends this process


def begin(parent: int) -> None:
    """Called once in each worker. One whose parent was killed would wait for work for ever, or
    write into a folder that the next run works in; so it ends, too."""
    global _parent
    _parent = parent
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while not orphaned():
            time.sleep(1)
        time.sleep(10)  # the training loop writes its checkpoint meanwhile
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def orphaned() -> bool:
    """Whether the process that started this worker is gone."""
    return _parent != 0 and os.getppid() != _parent


def run(
    unit: Unit, base: Path, tasks: Path, out: Path, floors: Mapping[str, float]
) -> dict[str, Any]:
    """Do one unit; returns its line for scores.jsonl. `floors` has the base's exact match on the
    test split of each of the unit's tasks."""
    try:
        return (
            _base(unit, base, tasks)
            if unit.kind is None
            else _trained(unit, base, tasks, out, floors)
        )
    except KeyboardInterrupt:
        if orphaned():
            os._exit(1)
        raise


def checkpoint_of(out: Path, unit: Unit) -> Path:
    """Where a unit's training is kept until its scores are."""
    return out / "checkpoints" / f"{unit.name}.safetensors"


def _load(base: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokenizer


def _read(tasks: Path, name: str) -> "Task":
    from adaptlib.training import read_task

    return read_task(tasks / f"{name}.jsonl")


def _exact(model: Any, tokenizer: Any, task: "Task") -> dict[str, dict[str, Any]]:
    """By split the exact match, the rows, and for each row whether it was right: "0110..."."""
    from adaptlib.evaluation.score import exact_match, same
    from adaptlib.training.tasks import output_of

    found = {}
    for split in SPLITS:
        score = exact_match(model, tokenizer, task, split=split, max_length=MAX_LENGTH)
        wanted = [output_of(row) for row in task.split(split)]
        pairs = zip(score.predictions, wanted, strict=True)
        hits = "".join("01"[same(prediction, output)] for prediction, output in pairs)
        found[split] = {"value": round(score.value, 4), "n": score.n, "hits": hits}
    return found


def _base(unit: Unit, base: Path, tasks: Path) -> dict[str, Any]:
    """The base model on one task: exact match, its likeliest label, the commonest answer."""
    from adaptlib.evaluation.score import label_accuracy
    from adaptlib.training.tasks import output_of

    started = time.monotonic()
    task = _read(tasks, unit.tasks[0])
    model, tokenizer = _load(base)
    line: dict[str, Any] = {"category": task.category, "scores": {task.name: {}}}
    line["scores"][task.name] = _exact(model, tokenizer, task)
    line["label"], line["majority"] = {}, {}
    for split in SPLITS:
        outputs = Counter(output_of(row).strip().casefold() for row in task.split(split))
        line["majority"][split] = round(max(outputs.values()) / outputs.total(), 4)
        if task.labels:
            score = label_accuracy(model, tokenizer, task, split=split, max_length=MAX_LENGTH)
            line["label"][split] = round(score.value, 4)
    return _named(unit) | line | {"seconds": round(time.monotonic() - started, 1)}


def _trained(
    unit: Unit, base: Path, tasks: Path, out: Path, floors: Mapping[str, float]
) -> dict[str, Any]:
    from adaptlib.experts.base import DEMO_BASE
    from adaptlib.experts.codec import pack, write_directory
    from adaptlib.training import train
    from adaptlib.training.modules import applied

    assert unit.kind is not None
    started = time.monotonic()
    model, tokenizer = _load(base)
    teller = Teller(unit)
    read = [_read(tasks, name) for name in unit.tasks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inputs that are cut; the card counts them
        expert = train(
            model,
            tokenizer,
            read[0] if len(read) == 1 else read,
            kind=unit.kind,
            options=unit.options(),
            name=unit.name if len(read) > 1 else None,
            base=DEMO_BASE,
            progress=teller,
            checkpoint=checkpoint_of(out, unit),
            checkpoint_every=CHECKPOINT_EVERY,
        )
    train_seconds = time.monotonic() - started
    with applied(model, expert):
        scores = {task.name: _exact(model, tokenizer, task) for task in read}
    training, metrics = expert.card["training"], dict(expert.card["metrics"])
    line = _named(unit) | {
        "scores": scores,
        "examples": training["examples"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "best_epoch": training["best_epoch"],
        "train_loss": metrics["train_loss"],
        "valid_loss": metrics.get("valid_loss"),
        "params": expert.params,
        "train_seconds": round(train_seconds, 1),
        "resumed": teller.first > 1,  # then the seconds are those since the last start
    }
    if unit.kept:
        tests = [score["test"] for score in scores.values()]
        metrics |= {  # of several tasks the mean over the tasks
            "test_exact_match": _mean([test["value"] for test in tests]),
            "test_exact_match_base": _mean([floors[name] for name in unit.tasks]),
            "test_rows": sum(test["n"] for test in tests),
        }
        final = out / "experts" / unit.name
        partial = out / "experts" / f".{unit.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_directory(pack(replace(expert, card={**expert.card, "metrics": metrics})), partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        line["bytes"] = sum(file.stat().st_size for file in final.iterdir())
    return line | {"seconds": round(time.monotonic() - started, 1)}


def _named(unit: Unit) -> dict[str, Any]:
    return {"name": unit.name, "method": unit.method, "spec": unit.spec()}


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


class Teller:
    """Says now and then how far a long training is, and ends one that nobody waits for. `first` is
    the number of the first step that it was told of."""

    def __init__(self, unit: Unit) -> None:
        self.name = unit.name
        self.first = 0
        self.said = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        self.first = self.first or progress.step
        if orphaned():
            raise KeyboardInterrupt  # the loop writes its checkpoint
        if time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            print(
                f"  {self.name}: step {progress.step} of {progress.steps}, "
                f"loss {progress.loss:.3f}",
                flush=True,
            )
