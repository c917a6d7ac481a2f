"""Adapters, experts and parts of them, made byte by byte without torch: honest until changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MODULE = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{MODULE}.lora_A.weight"
B = f"base_model.model.{MODULE}.lora_B.weight"
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "lora_alpha": 4,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["q_proj"],
}
_DTYPES = {"<f4": "F32", "<f2": "F16", "<i4": "I32", "<i8": "I64", "|u1": "U8"}


def file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, a document or its exact text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: Any, stop: Any, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(stop - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


def tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An honest file of these arrays."""
    header, data = {}, b""
    for name, array in arrays.items():
        piece = np.ascontiguousarray(array).tobytes()
        header[name] = entry(
            len(data), len(data) + len(piece), list(array.shape), _DTYPES[array.dtype.str]
        )
        data += piece
    return file(header, data)


def pair(seed: int = 0) -> dict[str, np.ndarray]:
    """lora_A and lora_B of one module (4, 6)."""
    random = np.random.default_rng(seed)
    return {
        A: random.standard_normal((2, 6), np.float32),
        B: random.standard_normal((4, 2), np.float32),
    }


def adapter(
    folder: Path, config: Any = None, weights: bytes | Mapping[str, np.ndarray] | None = None
) -> Path:
    """A PEFT directory. `config` is changes to CONFIG, or the exact text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(CONFIG | (config or {})).encode()
    (folder / "adapter_config.json").write_bytes(text)
    found = pair() if weights is None else weights
    data = found if isinstance(found, bytes) else tensors(found)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def shira(folder: Path, config: Any = None, **arrays: np.ndarray) -> Path:
    """A SHiRA adapter: ten entries of a (4, 6) matrix."""
    flat = np.array([0, 1, 2, 3, 7, 9, 12, 17, 20, 23])
    both = {
        "shira_weight": np.arange(1, 11, dtype=np.float32),
        "shira_indices": np.stack([flat // 6, flat % 6]).astype(np.int32),
    } | arrays
    named = {f"base_model.model.{MODULE}.{part}": array for part, array in both.items()}
    changes = {"peft_type": "SHIRA", "r": 1, **(config or {})}
    return adapter(folder, changes, named)


def manifest(data: bytes, /, **changes: Any) -> dict[str, Any]:
    """What expert.json says of the file of tensors that `expert` writes."""
    return {
        "schema": "adaptlib.expert/1",
        "kind": "lora",
        "base": "org/base",
        "blob": {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)},
        "modules": {MODULE: {"shape": [4, 6], "rank": 2, "scale": 2.0}},
        "tensors": {
            f"{MODULE}.lora_a": {"dtype": "F32", "shape": [2, 6]},
            f"{MODULE}.lora_b": {"dtype": "F32", "shape": [4, 2]},
        },
        "card": {"base": {"id": "org/base", "revision": None, "digest": None}},
    } | changes


def blob(seed: int = 0) -> bytes:
    """The tensors of an expert."""
    a, b = pair(seed).values()
    return tensors({f"{MODULE}.lora_a": a, f"{MODULE}.lora_b": b})


def expert(
    folder: Path, text: bytes | None = None, data: bytes | None = None, **changes: Any
) -> Path:
    """An adaptlib directory. `changes` are to its manifest, `text` is it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    data = blob() if data is None else data
    whole = json.dumps(manifest(data, **changes)).encode() if text is None else text
    (folder / "expert.json").write_bytes(whole)
    (folder / "expert.safetensors").write_bytes(data)
    return folder
