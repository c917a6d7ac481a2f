"""Bake: an expert into the weights of its base model, for whatever loads full models."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from adaptlib.errors import AdaptlibError, ConflictError, RefusedError
from adaptlib.experts.base import BaseModel, check_fit
from adaptlib.experts.expert import Expert


def check_bake(model: Any, expert: Expert, name: str = "the expert") -> None:
    """Raises as `bake` would, and changes nothing."""
    base = BaseModel.of(model)
    pin = {"id": expert.base} | dict(expert.card.get("base") or {})
    check_fit(name, expert.shapes, pin, base)
    modules = dict(model.named_modules())
    weights: dict[int, list[str]] = {}
    for where, parameter in model.named_parameters(remove_duplicate=False):
        weights.setdefault(id(parameter), []).append(where)
    for module in expert.shapes:
        weight = modules[module].weight
        others = [w for w in weights.get(id(weight), ()) if w != f"{module}.weight"]
        if others:
            raise RefusedError(
                f"{name} adapts {module}, whose weight is that of {others[0]} too: the sum would "
                "change both",
                hint="attach the expert instead, which changes one",
            )
        if not weight.dtype.is_floating_point:
            raise RefusedError(
                f"{module} has weights of {str(weight.dtype).removeprefix('torch.')}, to which "
                "nothing can be added",
                hint="load the model without quantization",
            )
        if weight.device.type == "meta":
            raise RefusedError(
                f"the weights of {module} are not in memory (device meta)",
                hint="load the model without disk or CPU offload",
            )


def bake(model: Any, expert: Expert, name: str = "the expert") -> None:
    """Add ΔW to the weights of each module that the expert adapts, once and for good.

    W + ΔW is summed in float32 and rounded to the model's own dtype. Raises BaseMismatchError for
    an expert of another base model, RefusedError for a module whose weight another one shares, is
    quantized or is not in memory; then nothing was changed.
    """
    check_bake(model, expert, name)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for module_name in expert.shapes:
            module: nn.Module = modules[module_name]
            update = expert.deltas[module_name].dense()
            update = update.T if isinstance(module, Conv1D) else update
            weight: Any = module.weight
            weight.copy_(weight.float() + update.to(weight.device))


def write_model(
    model: Any,
    tokenizer: Any,
    expert: Expert,
    directory: Path,
    *,
    name: str = "the expert",
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the base model with the expert in its weights as a directory that
    `AutoModelForCausalLM.from_pretrained` loads: config, weights in safetensors, tokenizer and a
    README. `model` keeps the sum (see `bake`); `dtype` is that of the files, the model's own where
    it is not said. All of it is there in the end, or nothing: it is written beside `directory`,
    which must be new or empty, and renamed. `about` goes into the README.
    """
    check_new(directory)
    check_bake(model, expert, name)
    size = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
    above = directory.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(above).free
    if free < size:
        raise AdaptlibError(
            f"the model takes {size / 1e6:,.0f} MB on disk; {above} has {free / 1e6:,.0f} MB free"
        )
    bake(model, expert, name)
    if dtype is not None:
        model.to(dtype)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for each shard is no news
    partial = above / f".{directory.name}.{os.getpid()}.partial"
    try:
        partial.mkdir()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        readme = partial / "README.md"
        readme.write_text(_readme(expert, name, about or {}), encoding="utf-8")
        for file in partial.iterdir():  # safetensors writes for its owner's eyes only
            file.chmod(readme.stat().st_mode)
        if directory.is_dir():
            directory.rmdir()  # it is empty; a rename onto it is not possible everywhere
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if bars:
            logging.enable_progress_bar()


def check_new(directory: Path) -> None:
    """ConflictError unless the directory is new or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConflictError(
            f"{directory} is there and not empty", hint="give a directory that is new or empty"
        )


def _readme(expert: Expert, name: str, about: Mapping[str, Any]) -> str:
    pin = dict(expert.card.get("base") or {})
    revision = f", revision {pin['revision']}" if pin.get("revision") else ""
    said = {"description": expert.card.get("description"), "expert": name, **about}
    said["licence of the expert"] = expert.card.get("licence") or "not said"
    lines = [f"- {key}: {' '.join(str(value).split())}" for key, value in said.items() if value]
    return (
        f"# {name}\n\n"
        f"The weights of {expert.base}{revision} with an expert added to them (W + ΔW), written "
        "by adaptlib.\n\n"
        + "\n".join(lines)
        + f"\n\nThe licence of {expert.base} holds for these weights too.\n"
    )
