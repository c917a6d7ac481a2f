"""train: from a task to an expert."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

import adaptlib
from adaptlib.errors import AdaptlibError
from adaptlib.experts.expert import Expert
from adaptlib.training.encode import pad_of
from adaptlib.training.modules import frozen, target_modules
from adaptlib.training.options import DEFAULTS, Kind, TrainOptions
from adaptlib.training.plan import KINDS, Plan, plan, recipe
from adaptlib.training.run import Counts, Progress, Run
from adaptlib.training.tasks import Task
from adaptlib.training.trainee import Learner, Trainee

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

L = TypeVar("L", bound=Learner)
R = TypeVar("R")


def train(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task | Sequence[Task],
    *,
    kind: Kind = "lora",
    options: TrainOptions = DEFAULTS,
    name: str | None = None,
    base: str | None = None,
    start: Expert | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
) -> Expert:
    """Train one expert on a causal language model, which is left as it was.

    The loss is the mean over the tokens of the answers and the eos after them, given
    `tasks.prompt`. Several tasks give one joint expert, called `name` in its card. LoRA follows
    arXiv:2106.09685 section 4.1; sparse follows arXiv:2507.07140 section 3; `full` moves the
    linear modules' own weights and gives a sparse expert that keeps every entry. `base` overrides
    the id that the expert records. `start` is a LoRA expert to go on from, of the same modules and
    rank. `progress` is called after each step.

    With `checkpoint`, a file, the run is written there about every `checkpoint_every` seconds and
    on Ctrl-C, and goes on from there where the file exists; the expert is the same, to the bit, as
    without an interruption, on the same machine with as many threads. The file is not removed.

    The card holds the task, the recipe, `key` (see `Plan`) and the losses, and no times. Load the
    model in float32 for sparse and full training: in half precision W + Ŵ has few digits.

    Raises UsageError for options that fit neither model nor task, before the first step;
    ConflictError for a checkpoint of another run; AdaptlibError, naming the step and the rows,
    where the loss is not finite, and where memory or disk run out.
    """
    return carry_out(
        plan(model, tokenizer, task, kind=kind, options=options, name=name, base=base, start=start),
        model,
        tokenizer,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )


def carry_out(
    the_plan: Plan,
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
) -> Expert:
    """`train`, of a plan that was made for this model and tokenizer."""
    options = the_plan.options
    # The paper chooses masks every 100 steps; its epochs have thousands. With a short epoch that
    # would be once or never, so at least four choices are made.
    often = max(1, min(options.reselect_every, the_plan.steps_per_epoch // 4))

    def make() -> Trainee:
        modules = target_modules(model, options.target)
        trainee = KINDS[the_plan.kind](modules, replace(options, reselect_every=often))
        if the_plan.start is not None:
            trainee.start_from(the_plan.start)
        return trainee

    deltas, counts = run_learner(
        the_plan,
        model,
        tokenizer,
        make,
        lambda trainee: trainee.deltas(options.dtype),
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    return Expert(the_plan.pin["id"], deltas, card(the_plan, counts))


def run_learner(
    the_plan: Plan,
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    make: Callable[[], L],
    take: Callable[[L], R],
    *,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
) -> tuple[R, Counts]:
    """Train the learner that `make` makes, and `take` from it what it has learned while it is still
    installed. The model is borrowed: it is frozen meanwhile, and as before afterwards."""
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        frozen(model),
        torch.random.fork_rng(devices),
        _autocast(model, bool(the_plan.options.bf16)),
        _enough_memory(the_plan),
    ):
        learner = make()
        with learner.installed():
            run = Run(
                the_plan, model, learner, pad_of(tokenizer), progress, checkpoint, checkpoint_every
            )
            run.start()
            run.finish()
            return take(learner), run.counts


def card(plan: Plan, counts: Counts) -> dict[str, Any]:
    """What is known about an expert after training, and all that it takes to train it again."""
    tasks, options = plan.tasks, plan.options
    training = (
        {"kind": plan.kind}
        | recipe(plan.kind, options)
        | {
            "max_length": plan.max_length,
            "init": f"drawn from init_seed {options.init_seed} and each module's name, so that all "
            "experts of this seed start alike",
            "data": [{"task": task.name, "digest": task.digest} for task in tasks],
            "examples": len(plan.train),
            "steps": counts.step,
            "tokens": counts.tokens,
            "cut_inputs": plan.cut,
            "dropped_rows": plan.dropped,
            "best_epoch": counts.best_epoch,
            "start": plan.start and plan.start.fingerprint,
            "key": plan.key,
            "versions": {"adaptlib": adaptlib.__version__, "torch": str(torch.__version__)},
        }
    )
    metrics = {"train_loss": round(counts.train_loss, 4)}  # over the last epoch
    if counts.best_loss is not None:
        metrics["valid_loss"] = round(counts.best_loss, 4)
    one = tasks[0] if len(tasks) == 1 else None
    licences = sorted({task.licence for task in tasks if task.licence})
    whole = {
        "base": plan.pin,
        "task": plan.name,
        "tasks": None if one else [task.name for task in tasks],
        "description": one.instruction or None if one else f"{len(tasks)} tasks, trained jointly",
        "category": one.category if one else None,
        "licence": ", ".join(licences) or None,
        "training": {key: value for key, value in training.items() if value is not None},
        "metrics": metrics,
    }
    return {key: value for key, value in whole.items() if value is not None}


def _autocast(model: PreTrainedModel, enabled: bool) -> torch.autocast:
    # Its cache of weights in bfloat16 lives as long as the context: here over many steps, after
    # each of which those that are trained are others.
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def _enough_memory(plan: Plan) -> Iterator[None]:
    """Turn running out of memory into a sentence that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("can't allocate memory", "not enough memory", "out of memory")
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(word in str(error) for word in words):
            raise
        options = plan.options
        raise AdaptlibError(
            f"out of memory while training on {plan.name}: about {plan.memory / 1e9:.1f} GB were "
            f"expected, with batches of {options.batch_size} x up to {plan.longest} tokens",
            hint=f"--batch-size {max(1, options.batch_size // 2)} --accumulate "
            f"{options.accumulate * 2}, a smaller --max-length, or fewer modules with --target",
        ) from error
