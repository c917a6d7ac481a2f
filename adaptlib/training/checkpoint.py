"""A training run on disk, to go on from: tensors and JSON in one safetensors file, no pickle."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from adaptlib.errors import AdaptlibError, CorruptError

_META = "meta"  # the JSON, as bytes in a tensor: one file is replaced whole or not at all


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace `path` by a file with these; it is the old one or the new one, whole, whatever
    happens. AdaptlibError where the disk is full."""
    text = torch.frombuffer(bytearray(json.dumps(dict(meta)).encode()), dtype=torch.uint8)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()} | {_META: text}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(save(whole))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdaptlibError(
                f"the disk is full: no room for the checkpoint {path}",
                hint="make room and run the same command again; it goes on from the one before",
            ) from error
        raise


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What was written, or None where there is nothing. CorruptError where it is no checkpoint."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        meta = json.loads(bytes(tensors.pop(_META).tolist()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptError(
            f"{path} is no checkpoint of a training run: {error}",
            hint="delete it; training then starts anew",
        ) from error
    return tensors, meta
