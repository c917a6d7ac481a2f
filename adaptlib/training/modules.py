"""Which modules an expert adapts, and how a model is borrowed and given back as it was."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import BaseMismatchError, UsageError
from adaptlib.experts.expert import Expert

ALL_LINEAR = "all-linear"
Linear = nn.Linear | Conv1D


def target_modules(model: PreTrainedModel, target: str | tuple[str, ...]) -> dict[str, Linear]:
    """The linear modules (nn.Linear, Conv1D) that `target` names, by their name in the model.

    `all-linear` is every one but the output embeddings. Else each entry is a name, the end of a
    name (`q_proj`) or `re:` and a regular expression for the whole name
    (`re:.*layers\\.[01]\\..*`). Raises UsageError where an entry matches nothing.
    """
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if target == ALL_LINEAR or target == (ALL_LINEAR,):
        return linear
    chosen: set[str] = set()
    for entry in (target,) if isinstance(target, str) else target:
        hits = [name for name in linear if _names(entry, name)]
        if not hits:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UsageError(
                f"target {entry!r} matches no linear module; there are: {known}",
                hint=f"one of these, {ALL_LINEAR}, or re: and a pattern for a whole name such as "
                f"{next(iter(linear), 'model.layers.0.mlp.up_proj')}",
            )
        chosen.update(hits)
    return {name: module for name, module in linear.items() if name in chosen}


def _names(entry: str, name: str) -> bool:
    if not entry.startswith("re:"):
        return bool(entry) and (name == entry or name.endswith(f".{entry}"))
    try:
        return re.fullmatch(entry[3:], name) is not None
    except re.error as error:
        raise UsageError(f"target {entry!r} is no regular expression: {error}") from error


def shape_of(module: Linear) -> tuple[int, int]:
    """(d_out, d_in); Conv1D keeps its weight the other way round."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, nothing in `model` asks for gradients; after it, flags and modes are as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def applied(model: PreTrainedModel, expert: Expert) -> Iterator[None]:
    """Inside, each adapted weight is W + ΔW; outside, exactly W again.

    The slow and obvious way to use one expert: what routing is compared with. Raises
    BaseMismatchError where a module is missing or of another shape; then nothing was changed.
    """
    named = dict(model.named_modules())
    modules: dict[str, Linear] = {}
    for name, delta in expert.deltas.items():
        module = named.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise BaseMismatchError(f"the expert adapts {name}, which this model does not have")
        if shape_of(module) != delta.shape:
            raise BaseMismatchError(
                f"{name} is {shape_of(module)} in this model and {delta.shape} in the expert"
            )
        modules[name] = module
    originals = {name: module.weight.data.clone() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            update = expert.deltas[name].dense().to(module.weight.device)
            update = update.T if isinstance(module, Conv1D) else update
            module.weight.data.copy_(module.weight.data.float() + update)
        yield
    finally:
        for name, original in originals.items():
            modules[name].weight.data.copy_(original)
