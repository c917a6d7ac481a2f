"""Running the base model with updates added, for merges that look at data.

Nothing of it stays: hooks, flags and modes are as before, also after an error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.merge import Data

IGNORED = -100  # a label that is not predicted, as transformers has it
Batch = Mapping[str, Tensor]
Look = Callable[[str, Tensor, Tensor], None]  # module, its input, its output


@contextmanager
def running(
    model: Any,
    updates: Mapping[str, Sequence[Delta]],
    *,
    at: Mapping[str, tuple[int, int]] | None = None,
    look: Look | None = None,
) -> Iterator[None]:
    """Inside, each module gives W x + Σ ΔW x for its `updates`, in evaluation mode, and no
    parameter asks for gradients.

    `look` is called with the input and the output of each module in `at`, whose values are their
    (d_out, d_in). Where gradients are on, these outputs have one. Raises BaseMismatchError where a
    module is missing or of another shape; then nothing was changed.
    """
    shapes = {name: deltas[0].shape for name, deltas in updates.items() if deltas}
    modules = _modules(model, shapes | dict(at or {}))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    handles: list[Any] = []
    try:
        model.requires_grad_(False)
        model.eval()
        for name, module in modules.items():
            seen = look if at is not None and name in at else None
            hook = partial(_hook, name, tuple(updates.get(name, ())), seen)
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _hook(
    name: str,
    deltas: Sequence[Delta],
    look: Look | None,
    _module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    x: Tensor = inputs[0]
    for delta in deltas:
        output = output + _applied(delta, x)
    if look is not None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        look(name, x, output)
    return output


def _applied(delta: Delta, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """ΔW x. Of a sparse one by a dense ΔW that is gone right after: for many tokens that is ten
    times faster than a sparse product on a CPU (measured: keep ratio .1, 192 by 512)."""
    if isinstance(delta, SparseDelta):
        return nn.functional.linear(x, delta.dense().to(x))
    return delta.apply(x)


def _modules(model: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """The modules of these names and (d_out, d_in); Conv1D keeps its weight the other way round."""
    from transformers.pytorch_utils import Conv1D

    named = dict(model.named_modules())
    for name, shape in shapes.items():
        weight = getattr(named.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise BaseMismatchError(
                f"the experts adapt {name}, which this model does not have",
                hint="give the base model that they were trained on",
            )
        found = tuple(weight.shape)
        found = found[::-1] if isinstance(named[name], Conv1D) else found
        if found != shape:
            raise BaseMismatchError(
                f"{name} is {found} in this model and {shape} in the experts",
                hint="give the base model that they were trained on",
            )
    return {name: named[name] for name in shapes}


def checked_batches(
    data: Data, names: Iterable[str] | None, *, labels: bool
) -> dict[str, list[Batch]]:
    """The batches of each of `names` (of whatever there is, if None). UsageError where some are
    missing, empty, of no expert here, or lack what is wanted of a batch."""
    given = dict(data.batches)
    wanted = list(given) if names is None else list(names)
    if unknown := [name for name in given if name not in wanted]:
        raise UsageError(
            f"batches for {unknown[0]!r}, which is not merged here; there are: {', '.join(wanted)}"
        )
    if absent := [name for name in wanted if name not in given]:
        raise UsageError(
            f"no batches for {absent[0]!r}; each of the experts wants its own: {', '.join(wanted)}",
            hint="adaptlib.evaluation.merge_data(model, tokenizer, tasks) makes them",
        )
    if not wanted:
        raise UsageError("there are no batches; give one at least")
    found: dict[str, list[Batch]] = {}
    for name in wanted:
        found[name] = list(given[name])
        if not found[name]:
            raise UsageError(f"the batches for {name!r} are empty; give one at least")
        for batch in found[name]:
            _check(name, batch, labels)
    return found


def _check(name: str, batch: Batch, labels: bool) -> None:
    keys = ("input_ids", "labels") if labels else ("input_ids",)
    for key in keys:
        if key not in batch:
            raise UsageError(
                f"a batch for {name!r} has no {key}; got {', '.join(batch) or 'nothing'}"
            )
    shape = tuple(batch["input_ids"].shape)
    for key in ("attention_mask", "labels"):
        if key in batch and (len(shape) != 2 or tuple(batch[key].shape) != shape):
            raise UsageError(
                f"a batch for {name!r} has {key} of shape {tuple(batch[key].shape)} and input_ids "
                f"of {shape}; want both (sequence, tok)"
            )
    if labels and not bool((batch["labels"][:, 1:] != IGNORED).any()):
        raise UsageError(
            f"a batch for {name!r} has no label but {IGNORED}: there is nothing to predict"
        )


def forward(model: Any, batch: Batch) -> Float[Tensor, "sequence tok vocab"]:
    """The logits of a batch."""
    device = device_of_model(model)
    ids = batch["input_ids"].to(device)
    mask = batch["attention_mask"].to(device) if "attention_mask" in batch else None
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def device_of_model(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    return getattr(model, "device", torch.device("cpu"))


def loss(model: Any, batch: Batch) -> tuple[Float[Tensor, ""], int]:
    """The sum of -log p over the labelled tokens, each predicted from those before it, and how
    many they are."""
    logits = forward(model, batch)
    labels = batch["labels"][:, 1:].to(logits.device)
    there = labels != IGNORED
    total = nn.functional.cross_entropy(
        logits[:, :-1][there].float(), labels[there], reduction="sum"
    )
    return total, int(there.sum())


def tokens(
    x: Float[Tensor, "*batch d_in"], mask: Bool[Tensor, "sequence tok"] | None
) -> Float[Tensor, "row d_in"]:
    """The rows of a module's input that are no padding, float32. All of them where the module was
    given other rows than the model."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).to(rows.device)]
    return rows.float()


def sequences(batches: Iterable[Batch]) -> Iterator[Batch]:
    """One sequence at a time, (1, tok), without what pads it on the right (padding on the left
    moves positions, and stays); none without a label."""
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            if "attention_mask" in one:
                end = max(one["attention_mask"][0].nonzero().flatten().tolist(), default=-1) + 1
                one = {key: value[:, :end] for key, value in one.items()}
            if bool((one["labels"][:, 1:] != IGNORED).any()):
                yield one


def check_weights(method: str, weights: Mapping[str, float]) -> None:
    """UsageError unless the weights are 0 or more, and one is above."""
    for name, weight in weights.items():
        if weight < 0:
            raise UsageError(f"{method} wants weights of 0 or more; {name!r} has {weight}")
    if not sum(weights.values()):
        raise UsageError(f"{method} wants one weight above 0; all are 0")


def device_of(delta: Delta) -> torch.device:
    """Where its numbers are."""
    return (
        delta.a.device if isinstance(delta, LoRADelta) else cast(SparseDelta, delta).values.device
    )


def check_finite(what: str, name: str, module: str, tensor: Tensor) -> None:
    """RefusedError where a measured tensor holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        raise RefusedError(
            f"{what} of expert {name!r} at {module} holds NaN or infinity",
            hint="load the base model in float32, or look at the batches",
        )
