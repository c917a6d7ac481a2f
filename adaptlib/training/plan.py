"""What a training run will be, before its first step: data, steps, parameters, memory, identity."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import PreTrainedModel

from adaptlib.errors import DataWarning, UsageError
from adaptlib.experts.base import BaseModel
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.training.encode import IGNORED, Example, encode_task
from adaptlib.training.full import FullTrainee
from adaptlib.training.lora import LoRATrainee
from adaptlib.training.modules import Linear, shape_of, target_modules
from adaptlib.training.options import DEFAULTS, TrainOptions
from adaptlib.training.sparse import SparseTrainee
from adaptlib.training.tasks import Task
from adaptlib.training.trainee import Trainee

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # raised where the same data and options would give another expert than before
MAX_LENGTH = 512  # tokens, where nobody says
WIDE = 384  # hidden size from which bfloat16 pays on a CPU that has it

KINDS: dict[str, type[Trainee]] = {
    "full": FullTrainee,
    "lora": LoRATrainee,
    "sparse": SparseTrainee,
}


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A training run before its first step.

    `tokens` are those of one epoch, `longest` those of the longest example, `cut` the inputs that
    were shortened and `dropped` the rows left out, over both splits. `trainable` counts parameters
    once masks are fixed; `state` and `memory` are estimates in bytes at the peak, of what is
    trained and of all, the model's weights included. `key` names everything that decides the
    expert's bytes. `start` is the expert that training goes on from.
    """

    name: str
    tasks: tuple[Task, ...]
    kind: str
    options: TrainOptions
    train: tuple[Example, ...] = field(repr=False)
    valid: tuple[Example, ...] = field(repr=False)
    tokens: int
    longest: int
    cut: int
    dropped: int
    steps: int
    modules: int
    trainable: int
    state: int
    memory: int
    max_length: int
    pin: dict[str, Any]
    key: str
    start: Expert | None = field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.steps // self.options.epochs


def plan(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task | Sequence[Task],
    *,
    kind: str = "lora",
    options: TrainOptions = DEFAULTS,
    name: str | None = None,
    base: str | None = None,
    start: Expert | None = None,
) -> Plan:
    """Read and check everything that `train` will need, without training.

    Raises UsageError where data, options and model do not go together; warns where inputs are
    shortened or rows left out.
    """
    tasks = (task,) if isinstance(task, Task) else tuple(task)
    if not tasks:
        raise UsageError("there is nothing to train on: no task was given")
    if name is None:
        name = tasks[0].name if len(tasks) == 1 else f"joint of {len(tasks)} tasks"
    if options.bf16 is None:
        options = replace(options, bf16=bf16_pays(model))
    if kind not in KINDS:
        raise UsageError(f"kind wants {', '.join(KINDS)}; got {kind!r}")
    modules = target_modules(model, options.target)
    shapes = {name: shape_of(module) for name, module in modules.items()}
    KINDS[kind].check(shapes, options)
    check_start(start, kind, shapes, options)
    max_length = room(model, options)
    parts, counts = {}, {}
    for split, limit in (("train", options.rows), ("valid", None)):
        encoded = [
            encode_task(
                tokenizer,
                _first(part, split, limit),
                split,
                max_length=max_length,
                drop_long=options.drop_long,
            )
            for part in tasks
        ]
        parts[split] = tuple(
            replace(example, task=i) if i else example
            for i, one in enumerate(encoded)
            for example in one.examples
        )
        counts[split] = (sum(one.cut for one in encoded), sum(one.dropped for one in encoded))
    train, valid = parts["train"], parts["valid"]
    if not train:
        raise UsageError(
            f"task {name} has no training rows", hint="give it rows with the split train"
        )
    cut, dropped = (sum(pair) for pair in zip(*counts.values(), strict=True))
    if cut or dropped:
        said = _shortened(name, cut, dropped, len(train) + len(valid), max_length)
        warnings.warn(said, DataWarning, stacklevel=2)
    rows_a_step = options.batch_size * options.accumulate
    longest = max(len(example.ids) for example in train)
    pin = BaseModel.of(model).pin()
    pin["id"] = base or pin["id"] or f"unnamed {model.config.model_type}"
    trainable, state = KINDS[kind].cost(list(shapes.values()), options)
    return Plan(
        name=name,
        tasks=tasks,
        kind=kind,
        options=options,
        train=train,
        valid=valid,
        tokens=sum(len(example.ids) for example in train),
        longest=longest,
        cut=cut,
        dropped=dropped,
        steps=math.ceil(len(train) / rows_a_step) * options.epochs,
        modules=len(modules),
        trainable=trainable,
        state=state,
        memory=state + memory(model, tokens=longest * options.batch_size),
        max_length=max_length,
        pin=pin,
        key=_key(model, kind, options, modules, (train, valid), start),
        start=start,
    )


def check_start(
    start: Expert | None, kind: str, shapes: dict[str, tuple[int, int]], options: TrainOptions
) -> None:
    """UsageError where training of this kind cannot go on from `start`."""
    if start is None:
        return
    if kind != "lora" or start.kind != "lora":
        raise UsageError(
            f"training goes on from a LoRA expert to a LoRA expert; got {start.kind} to {kind}",
            hint="--kind lora, and a LoRA expert to begin with",
        )
    ranks = {d.rank for d in start.deltas.values() if isinstance(d, LoRADelta)}
    if start.shapes != shapes or ranks != {options.rank}:
        raise UsageError(
            f"the expert to begin with has {len(start.deltas)} modules and rank "
            f"{', '.join(map(str, sorted(ranks)))}; training wants the same {len(shapes)} modules "
            f"and rank {options.rank}",
            hint=f"--rank {max(ranks)}, and the same --target as it was trained with",
        )


def bf16_pays(model: PreTrainedModel) -> bool:
    """Whether autocast to bfloat16 makes steps faster: on GPUs and CPUs that multiply it in
    hardware, for layers that are wide enough. On a CPU with AVX-512 BF16, one thread, a LoRA step
    of 768 tokens took .83, .61 and .39 of the float32 time at widths 192, 384 and 768; with
    smaller batches the narrow ones lose."""
    if model.device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    able = any(getattr(torch.cpu, name, bool)() for name in asked)
    return able and getattr(model.config.get_text_config(), "hidden_size", 0) >= WIDE


def room(model: PreTrainedModel, options: TrainOptions) -> int:
    """The tokens that one example may have."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = options.max_length
    if wanted is None:
        return min(MAX_LENGTH, context or MAX_LENGTH)
    if context and wanted > context:
        raise UsageError(
            f"max_length {wanted} is more than the model can see: its context is {context} tokens",
            hint=f"--max-length {context}, or less",
        )
    return wanted


def memory(model: PreTrainedModel, *, tokens: int) -> int:
    """Bytes of the model's weights and of what the forward of a batch of `tokens` keeps for the
    backward, roughly.

    That is every linear module's input and output, as much again for norms, attention and
    activation functions, and logits for an eighth of the tokens. What Python and torch take
    themselves is not in it. (LoRA steps of `benchmarks/training.py`: estimated 137 and 520 MB above
    the model, measured 139 and 478.)
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = 4 if model.dtype == torch.float32 else 2
    wide = sum(sum(shape_of(m)) for m in target_modules(model, "all-linear").values())
    vocabulary = model.config.get_text_config().vocab_size
    return weights + tokens * (wide * size * 2 + vocabulary * 4 * 3 // 8)


def recipe(kind: str, options: TrainOptions) -> dict[str, Any]:
    """The options that matter for this kind, as JSON."""
    other = frozenset[str]().union(*(known.own for known in KINDS.values())) - KINDS[kind].own
    return {name: value for name, value in options.recipe().items() if name not in other}


def _first(task: Task, split: str, limit: int | None) -> Task:
    rows = task.rows.get(split, ())
    if limit is None or len(rows) <= limit:
        return task
    return Task(
        task.name,
        task.instruction,
        {**task.rows, split: rows[:limit]},
        category=task.category,
        licence=task.licence,
    )


def _shortened(name: str, cut: int, dropped: int, rows: int, max_length: int) -> str:
    said = []
    if cut:
        said.append(f"{cut} of {rows + dropped} inputs were cut to fit {max_length} tokens")
    if dropped:
        said.append(f"{dropped} rows were left out: their answers do not fit")
    return f"task {name}: {'; '.join(said)}"


def _key(
    model: PreTrainedModel,
    kind: str,
    options: TrainOptions,
    modules: dict[str, Linear],
    splits: tuple[tuple[Example, ...], ...],
    start: Expert | None,
) -> str:
    """SHA-256 over what decides the expert: the token ids (so text, template, tokenizer and
    max_length), the recipe, the modules, and a fingerprint of the model's weights."""
    digest = hashlib.sha256()
    what = recipe(kind, options) | {"kind": kind, "format": FORMAT, "modules": list(modules)}
    if start is not None:
        what["start"] = start.fingerprint
    digest.update(json.dumps(what, sort_keys=True).encode())
    for examples in splits:
        for example in examples:
            digest.update(json.dumps([example.ids, _spans(example)]).encode())
        digest.update(b"|")
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _spans(example: Example) -> list[int]:
    return [i for i, target in enumerate(example.targets) if target != IGNORED]
