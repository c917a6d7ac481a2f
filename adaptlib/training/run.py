"""A training run while it goes on: steps, epochs, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptlib.errors import AdaptlibError, ConflictError
from adaptlib.training.checkpoint import read_checkpoint, write_checkpoint
from adaptlib.training.encode import IGNORED, Batch, Example, batches
from adaptlib.training.options import TrainOptions
from adaptlib.training.plan import Plan
from adaptlib.training.trainee import Learner

CALIBRATION = 8  # batches that masks are chosen from at the start, where gradients are asked for
OPTIMIZER, TRAINEE, BEST, RNG = "optimizer", "trainee", "best", "rng"  # parts of a checkpoint


@final
@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after a step. `loss` in nats per answer token of this step; `tokens` of
    `tokens_total` have been read, prompts included; `valid_loss` is set after the last step of an
    epoch where there is a `valid` split."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    lr: float
    tokens: int
    tokens_total: int
    valid_loss: float | None = None


@final
@dataclass(slots=True)
class Counts:
    """What a checkpoint keeps of a run besides tensors. `place` is the number of steps done in
    `epoch`; `total` the summed loss and `answers` the answer tokens of that epoch; `stale` the
    epochs since the best."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    tokens: int = 0
    total: float = 0.0
    answers: int = 0
    train_loss: float = 0.0
    best_loss: float | None = None
    best_epoch: int = 0
    stale: int = 0


@final
@dataclass(eq=False)
class Run:
    """The one thing here that changes; `loop.train` drives it inside `learner.installed()`."""

    plan: Plan
    model: PreTrainedModel
    learner: Learner
    pad: int
    progress: Callable[[Progress], None] | None = None
    checkpoint: Path | None = None
    checkpoint_every: float = 60.0
    counts: Counts = field(default_factory=Counts)
    best: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.saved = time.monotonic()
        self.consistent = False  # whether what `save` would write is the state after a whole step
        torch.manual_seed(self.plan.options.seed)  # dropout, the model's own too

    def start(self) -> None:
        """Go on from the checkpoint, or choose first masks."""
        kept = read_checkpoint(self.checkpoint) if self.checkpoint else None
        if kept is not None:
            self._restore(*kept)
        else:
            self.model.train()
            some = islice(self._batches(0), CALIBRATION)
            self.learner.begin((lambda b=batch: self._loss(b)) for batch in some)
            self.optimizer = self._new_optimizer()
        self._whole_step()

    def finish(self) -> None:
        """Every step that is left. Then the learner is as it was after the best epoch."""
        options = self.plan.options
        try:
            while self.counts.epoch < options.epochs and self._hopes():
                self._one_epoch()
        except KeyboardInterrupt:
            if self.consistent:
                self.save()  # else the one before stays
            raise
        if self.best is not None:
            self.learner.load(self.best)

    def _hopes(self) -> bool:
        patience = self.plan.options.patience
        return patience is None or self.counts.stale < patience

    def _one_epoch(self) -> None:
        counts, options, last = self.counts, self.plan.options, self.plan.steps_per_epoch
        self.model.train()
        order = self._batches(counts.epoch)
        for number in range(last):
            group = list(islice(order, options.accumulate))
            if number < counts.place:
                continue  # done before the checkpoint
            loss, lr = self._backward(group)
            self.consistent = False
            self._update(group, loss, lr)
            valid = self._end_epoch() if counts.place == last else None
            self._whole_step()
            if time.monotonic() - self.saved >= self.checkpoint_every:
                self.save()
            if self.progress is not None:
                self.progress(self._report(loss, lr, valid))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        options = self.plan.options
        seed = options.seed * 1000 + epoch
        return batches(self.plan.train, size=options.batch_size, pad=self.pad, seed=seed)

    def _backward(self, group: list[Batch]) -> tuple[float, float]:
        """Gradients of the mean loss over all answers of a step; (that loss, learning rate)."""
        options = self.plan.options
        self.optimizer.zero_grad(set_to_none=True)
        answers = sum(_answers(batch) for batch in group)
        loss = 0.0
        for batch in group:
            part = self._loss(batch, reduction="sum") / answers
            value = part.item()
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}", batch)
            extra = self.learner.extra()
            (part if extra is None else part + extra / len(group)).backward()
            loss += value
        return loss, options.lr * schedule(self.counts.step / self.plan.steps, options)

    def _loss(self, batch: Batch, *, reduction: str = "mean") -> Tensor:
        self.learner.reads(batch)
        return answer_loss(self.model, batch, reduction=reduction)

    def _update(self, group: list[Batch], loss: float, lr: float) -> None:
        counts = self.counts
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr * settings["speed"]
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.plan.options.clip)
        if not bool(norm.isfinite()):
            raise self._diverged(f"the norm of the gradient is {norm.item()}", group[-1])
        self.optimizer.step()
        counts.step += 1
        counts.place += 1
        answers = sum(_answers(batch) for batch in group)
        counts.total, counts.answers = counts.total + loss * answers, counts.answers + answers
        counts.tokens += sum(int(batch.attention_mask.sum()) for batch in group)
        self.learner.stepped(counts.step, counts.epoch, lambda: self._loss(group[-1]))

    def _end_epoch(self) -> float | None:
        """Settle the learner, and keep it where it is the best so far; the validation loss."""
        counts, options, valid = self.counts, self.plan.options, None
        if not all(bool(p.isfinite().all()) for p in self.learner.parameters()):
            raise self._diverged("weights are not finite", None)
        young = options.epochs > 1 and self.learner.young(counts.epoch)
        self.optimizer = self.learner.settle(self.optimizer, counts.epoch)
        counts.train_loss = counts.total / counts.answers
        counts.total, counts.answers, counts.place = 0.0, 0, 0
        counts.epoch += 1
        if self.plan.valid:
            valid = mean_loss(
                self.model,
                self.plan.valid,
                size=options.batch_size,
                pad=self.pad,
                reads=self.learner.reads,
            )
        if valid is None or not options.best_epoch:
            counts.best_loss, counts.best_epoch = valid, counts.epoch
        elif not young and (counts.best_loss is None or valid < counts.best_loss):
            counts.best_loss, counts.best_epoch, counts.stale = valid, counts.epoch, 0
            self.best = self.learner.state()
        elif not young:
            counts.stale += 1
        return valid

    def _whole_step(self) -> None:
        self.rng = torch.get_rng_state()
        if self.model.device.type == "cuda":
            self.cuda_rng = torch.cuda.get_rng_state(self.model.device)
        self.consistent = True

    def _report(self, loss: float, lr: float, valid: float | None) -> Progress:
        epochs = self.plan.options.epochs
        return Progress(
            step=self.counts.step,
            steps=self.plan.steps,
            epoch=(self.counts.step - 1) // self.plan.steps_per_epoch + 1,
            epochs=epochs,
            loss=loss,
            lr=lr,
            tokens=self.counts.tokens,
            tokens_total=self.plan.tokens * epochs,
            valid_loss=valid,
        )

    def save(self) -> None:
        """Write the checkpoint, where one is wanted."""
        if self.checkpoint is None:
            return
        tensors = {f"{RNG}.cpu": self.rng}
        if self.model.device.type == "cuda":
            tensors[f"{RNG}.cuda"] = self.cuda_rng
        for part, state in ((TRAINEE, self.learner.state()), (BEST, self.best or {})):
            tensors |= {f"{part}.{name}": value for name, value in state.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}.{i}.{key}": value.cpu() for key, value in moments.items()}
        counts = {name: getattr(self.counts, name) for name in Counts.__slots__}
        write_checkpoint(self.checkpoint, tensors, {"key": self.plan.key, "counts": counts})
        self.saved = time.monotonic()

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if meta["key"] != self.plan.key:
            raise ConflictError(
                f"{self.checkpoint} is of another run: other data, options or model",
                hint="delete it, or give another checkpoint",
            )
        parts: dict[str, dict[str, Tensor]] = {OPTIMIZER: {}, TRAINEE: {}, BEST: {}, RNG: {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.counts = Counts(**meta["counts"])
        self.learner.load(parts[TRAINEE])
        self.best = parts[BEST] or None
        self.optimizer = self._new_optimizer()
        state = self.optimizer.state_dict()
        for name, value in parts[OPTIMIZER].items():
            number, _, key = name.partition(".")
            state["state"].setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(parts[RNG]["cpu"])
        if "cuda" in parts[RNG]:
            torch.cuda.set_rng_state(parts[RNG]["cuda"], self.model.device)

    def _new_optimizer(self) -> torch.optim.AdamW:
        options = self.plan.options
        return torch.optim.AdamW(
            self.learner.groups(), lr=options.lr, weight_decay=options.weight_decay
        )

    def _diverged(self, what: str, batch: Batch | None) -> AdaptlibError:
        step = self.counts.step + 1
        rows = ""
        if batch is not None:
            shown = ", ".join(str(row + 1) for row in batch.rows[:16])
            rows = f", training rows {shown}"
        return AdaptlibError(
            f"training on {self.plan.name} diverged: {what} at step {step} of "
            f"{self.plan.steps}{rows}",
            hint=f"a smaller lr than {self.plan.options.lr}, or a base model without NaN",
        )


def schedule(done: float, options: TrainOptions) -> float:
    """The share of the peak learning rate when a share `done` of the steps is over: a rise over
    `warmup`, then `constant`, a `linear` fall to zero, or half a `cosine`."""
    if done < options.warmup:
        return done / options.warmup
    if options.schedule == "constant":
        return 1.0
    rest = (1 - done) / (1 - options.warmup)
    return rest if options.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * rest)


def answer_loss(model: PreTrainedModel, batch: Batch, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats over the labelled positions of `batch`."""
    labelled = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
    # only these columns need logits; a vocabulary is wide and most positions are prompt
    logits = model(
        input_ids=batch.input_ids.to(model.device),
        attention_mask=batch.attention_mask.to(model.device),
        logits_to_keep=labelled.to(model.device),
        use_cache=False,
    ).logits
    labels = batch.labels[:, labelled].to(model.device)
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=IGNORED
    )


def mean_loss(
    model: PreTrainedModel,
    examples: tuple[Example, ...],
    *,
    size: int,
    pad: int,
    reads: Callable[[Batch], None] | None = None,
) -> float:
    """Nats per answer token over all of `examples`, without dropout. `reads` is told of each batch
    before the model reads it."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(examples, size=4 * size, pad=pad):
            if reads is not None:
                reads(batch)
            total += answer_loss(model, batch, reduction="sum").item()
            tokens += _answers(batch)
    model.train()
    return total / tokens


def _answers(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())
