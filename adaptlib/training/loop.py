"""Training: one loop for both kinds of expert."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

import adaptlib
from adaptlib.errors import AdaptlibError, UsageError
from adaptlib.experts.base import BaseModel
from adaptlib.experts.expert import Expert
from adaptlib.training.encode import IGNORED, Batch, Example, batches, encode_rows, pad_of
from adaptlib.training.lora import LoRATrainee
from adaptlib.training.modules import ALL_LINEAR, Linear, frozen, target_modules
from adaptlib.training.sparse import SparseTrainee
from adaptlib.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["lora", "sparse"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Everything that can be chosen about a training run; the defaults suit a small model.

    `target` is `all-linear` or a tuple of module names or ends of names. `rank`, `alpha` and
    `dropout` matter for LoRA only; `keep_ratio`, `block` and `reselect_every` (steps) for sparse
    only. `lr` is the peak: it rises over the first `warmup` of the steps and falls in a line to
    zero. `max_length` is in tokens, prompt and answer together. With `best_epoch` the weights of
    the epoch with the lowest loss on the `valid` split are returned, else the last.
    """

    epochs: int = 5
    lr: float = 3e-3
    batch_size: int = 16
    max_length: int = 512
    target: str | tuple[str, ...] = ALL_LINEAR
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    keep_ratio: float = 0.1
    block: int = 1
    reselect_every: int = 100
    warmup: float = 0.06
    clip: float = 1.0
    best_epoch: bool = True
    seed: int = 0
    bf16: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length", "rank", "reselect_every", "lr", "clip"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} wants more than 0; got {getattr(self, name)}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} wants a share in [0, 1); got {getattr(self, name)}")


def train(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    *,
    kind: Kind = "lora",
    options: TrainOptions = TrainOptions(),
    base: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Expert:
    """Train one expert for `task` on a causal language model, which is left as it was.

    The loss is the mean over the tokens of the answer and the eos after it, given
    `tasks.prompt`. LoRA follows arXiv:2106.09685 section 4.1; sparse follows arXiv:2507.07140
    section 3: masks are chosen anew within the first epoch and fixed after it. `base` overrides
    the id that the expert records. `progress` is called with (step, steps in all, loss in nats
    per token). The card holds the task, the recipe and the losses. Load the model in float32 for
    sparse training: a half-precision model rounds W + Ŵ to its own few digits.

    Raises UsageError for options that fit neither model nor task, and AdaptlibError, naming the
    step, where the loss is not finite. Ctrl-C leaves the model as it was, too.
    """
    pad = pad_of(tokenizer)
    examples, cut = encode_rows(tokenizer, task, task.split("train"), max_length=options.max_length)
    valid, valid_cut = encode_rows(
        tokenizer, task, task.rows.get("valid", ()), max_length=options.max_length
    )
    if cut + valid_cut:
        warnings.warn(
            f"task {task.name}: {cut} of {len(examples)} training inputs and {valid_cut} of "
            f"{len(valid)} validation inputs were cut to fit {options.max_length} tokens",
            stacklevel=2,
        )
    trainee = _trainee(kind, target_modules(model, options.target), options)
    per_epoch = math.ceil(len(examples) / options.batch_size)
    steps = per_epoch * options.epochs
    # The paper chooses masks every 100 steps; its epochs have thousands. With a short epoch that
    # would be once or never, so at least four choices are made.
    reselect = max(1, min(options.reselect_every, per_epoch // 4))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=options.lr, weight_decay=0.0)
    best, best_loss, best_after = None, math.inf, options.epochs
    step, started, total, tokens = 0, time.monotonic(), 0.0, 0

    with frozen(model), torch.random.fork_rng(), _autocast(model, options):
        torch.manual_seed(options.seed)  # dropout, the model's own too
        for epoch in range(options.epochs):
            model.train()
            total, tokens = 0.0, 0
            for batch in batches(
                examples, size=options.batch_size, pad=pad, seed=options.seed * 1000 + epoch
            ):
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * _schedule(step / steps, options.warmup)
                loss = answer_loss(trainee, model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise _diverged(task, f"the loss is {value}", step + 1, steps, options)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainee.parameters(), options.clip)
                optimizer.step()
                step += 1
                if isinstance(trainee, SparseTrainee) and epoch == 0 and step % reselect == 0:
                    trainee.select(lambda batch=batch: answer_loss(trainee, model, batch))
                answers = int((batch.labels != IGNORED).sum())
                total, tokens = total + value * answers, tokens + answers
                if progress is not None:
                    progress(step, steps, value)
            if not all(bool(p.isfinite().all()) for p in trainee.parameters()):
                raise _diverged(task, "weights are not finite", step, steps, options)
            if valid and options.best_epoch and not _mask_is_young(kind, epoch, options):
                now = mean_loss(trainee, model, valid, size=options.batch_size, pad=pad)
                if best is None or now < best_loss:
                    best, best_loss, best_after = trainee.deltas(options.dtype), now, epoch + 1
        deltas = best or trainee.deltas(options.dtype)
        if valid and best is None:
            best_loss = mean_loss(trainee, model, valid, size=options.batch_size, pad=pad)

    pin = BaseModel.of(model).pin()
    pin["id"] = base or pin["id"] or f"unnamed {model.config.model_type}"
    recipe = _recipe(options, kind) | {
        "steps": step,
        "examples": len(examples),
        "tokens": sum(len(example.ids) for example in examples) * options.epochs,
        "cut_inputs": cut,
        "best_epoch": best_after,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"adaptlib": adaptlib.__version__, "torch": str(torch.__version__)},
    }
    metrics = {"train_loss": round(total / tokens, 4)}  # over the last epoch
    if valid:
        metrics["valid_loss"] = round(best_loss, 4)
    return Expert(pin["id"], deltas, _card(task, pin, recipe, metrics))


def answer_loss(
    trainee: LoRATrainee | SparseTrainee,
    model: PreTrainedModel,
    batch: Batch,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats over the labelled positions of `batch`."""
    labelled = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
    # only these columns need logits; a vocabulary is wide and most positions are prompt
    inputs = {
        "input_ids": batch.input_ids.to(model.device),
        "attention_mask": batch.attention_mask.to(model.device),
        "logits_to_keep": labelled.to(model.device),
    }
    logits = trainee.logits(model, inputs)
    labels = batch.labels[:, labelled].to(model.device)
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction=reduction
    )


def mean_loss(
    trainee: LoRATrainee | SparseTrainee,
    model: PreTrainedModel,
    examples: list[Example],
    *,
    size: int,
    pad: int,
) -> float:
    """Nats per answer token over all of `examples`, without dropout."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(examples, size=4 * size, pad=pad):
            total += answer_loss(trainee, model, batch, reduction="sum").item()
            tokens += int((batch.labels != IGNORED).sum())
    return total / tokens


def _trainee(
    kind: str, modules: dict[str, Linear], options: TrainOptions
) -> LoRATrainee | SparseTrainee:
    if kind == "lora":
        return LoRATrainee(
            modules,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            seed=options.seed,
        )
    if kind == "sparse":
        return SparseTrainee(modules, keep_ratio=options.keep_ratio, block=options.block)
    raise UsageError(f"kind wants 'lora' or 'sparse'; got {kind!r}")


def _schedule(done: float, warmup: float) -> float:
    """The share of the peak learning rate when a fraction `done` of the steps is behind."""
    return (done + 1e-3) / warmup if done + 1e-3 < warmup else (1.0 - done) / (1.0 - warmup)


def _mask_is_young(kind: str, epoch: int, options: TrainOptions) -> bool:
    """The first epoch of a sparse expert ends right after its last choice of masks; its weights
    have hardly been trained under that mask, so they are not a candidate unless they are all."""
    return kind == "sparse" and epoch == 0 and options.epochs > 1


def _diverged(task: Task, what: str, step: int, steps: int, options: TrainOptions) -> AdaptlibError:
    return AdaptlibError(
        f"training on {task.name} diverged: {what} at step {step} of {steps}",
        hint=f"a smaller lr than {options.lr}, or a base model without NaN",
    )


def _autocast(model: PreTrainedModel, options: TrainOptions) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16)


def _card(
    task: Task, pin: dict[str, Any], recipe: dict[str, Any], metrics: dict[str, float]
) -> dict[str, Any]:
    card = {
        "base": pin,
        "task": task.name,
        "description": task.instruction,
        "category": task.category,
        "licence": task.licence,
        "training": recipe,
        "metrics": metrics,
    }
    return {key: value for key, value in card.items() if value is not None}


def _recipe(options: TrainOptions, kind: str) -> dict[str, Any]:
    """The options that mattered, as JSON."""
    unused = {
        "lora": {"keep_ratio", "block", "reselect_every"},
        "sparse": {"rank", "alpha", "dropout"},
    }[kind]
    recipe = {key: value for key, value in asdict(options).items() if key not in unused}
    recipe["dtype"] = str(options.dtype).removeprefix("torch.")
    if isinstance(options.target, tuple):
        recipe["target"] = list(options.target)
    return recipe
