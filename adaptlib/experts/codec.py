"""Experts as bytes: a safetensors blob with tensors only, and a manifest that says the rest.

`Packed` is an expert as bytes, `Expert` one as tensors; `pack` and `unpack` go between them.
Keeping, importing and exporting works on `Packed` and needs no torch.

    lora      <module>.lora_a (rank, d_in)      <module>.lora_b (d_out, rank)
    sparse    <module>.index (n,) I32 or I64    <module>.values (n,) or (n, 16, 16)
    either    <module>.gate (d_in,) F32         where a gate was trained for the expert
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
import numpy as np

from adaptlib.errors import CorruptError, NotFoundError, RefusedError
from adaptlib.experts.tensors import (
    FLOATS,
    MAX_AXES,
    MAX_SIDE,
    RawTensor,
    brief,
    check_depth,
    check_values,
    cut,
    encode,
    encoded_size,
    map_file,
    parse_json,
    read_tensors,
    release,
)

if TYPE_CHECKING:
    import torch

    from adaptlib.experts.delta import Delta
    from adaptlib.experts.expert import Expert

SCHEMA = "adaptlib.expert/1"
MANIFEST_NAME = "expert.json"
BLOB_NAME = "expert.safetensors"
MAX_MANIFEST = 16 * 1024 * 1024  # bytes
MAX_BASE = 512  # characters in the name of a base model
_PARTS = {"lora": ("lora_a", "lora_b"), "sparse": ("index", "values")}
GATE = "gate"
# The sides of a sparse expert's modules are said and not shown. All of them together are at most
# this, and so many for each entry more: what is made from shapes is in proportion to the file.
MAX_SIDES, SIDES_PER_ENTRY = 1 << 23, 64

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)]
_DIGEST = r"^sha256:[0-9a-f]{64}\Z"


class Module(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is known of one delta beside its tensors."""

    shape: tuple[_Count, _Count]  # (d_out, d_in)
    rank: _Count | None = None
    scale: float | None = None
    block: _Count | None = None


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_AXES)]


class BlobInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    digest: Annotated[str, msgspec.Meta(pattern=_DIGEST)]
    size: _Count  # bytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The canonical JSON whose SHA-256 is the expert's digest. It does not hold the name."""

    schema: Literal["adaptlib.expert/1"]
    kind: Literal["lora", "sparse"]
    base: str
    blob: BlobInfo
    modules: dict[str, Module]
    tensors: dict[str, TensorInfo]
    card: dict[str, Any]

    def encode(self) -> bytes:
        """Sorted keys, no spaces: the same manifest has the same bytes everywhere."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def rank(self) -> int | None:
        return max((m.rank for m in self.modules.values() if m.rank is not None), default=None)

    @property
    def params(self) -> int:
        """Numbers kept of the updates: all tensors but gates and the positions of sparse ones."""
        total = 0
        for name, tensor in self.tensors.items():
            if not name.endswith((".index", f".{GATE}")):
                total += math.prod(tensor.shape)
        return total

    @property
    def gates(self) -> int:
        """How many modules have a gate."""
        return sum(name.endswith(f".{GATE}") for name in self.tensors)


@dataclass(frozen=True, eq=False)
class Packed:
    """An expert as bytes; see `Expert` for the meaning of each part."""

    kind: str
    base: str
    modules: Mapping[str, Module]
    tensors: Mapping[str, RawTensor]
    card: Mapping[str, Any] = field(default_factory=dict)

    def blob(self) -> Iterator[bytes | memoryview]:
        """The safetensors file, in pieces."""
        return encode(self.tensors)

    def manifest(self, blob_digest: str) -> Manifest:
        info = {n: TensorInfo(t.dtype, t.shape) for n, t in sorted(self.tensors.items())}
        return Manifest(
            schema=SCHEMA,
            kind=cast(Literal["lora", "sparse"], self.kind),
            base=self.base,
            blob=BlobInfo(blob_digest, encoded_size(self.blob())),
            modules=dict(sorted(self.modules.items())),
            tensors=info,
            card=dict(self.card),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by module."""
        return {name: module.shape for name, module in self.modules.items()}


def encode_manifest(source: str, manifest: Manifest) -> bytes:
    """The bytes of a manifest that `parse_manifest` gives back. RefusedError where the card is not
    plain JSON data, or is too large."""
    try:
        data = manifest.encode()
        check_values(f"{source}: its manifest", data)
        check_depth(f"{source}: the card", manifest.card)
        same = msgspec.json.decode(data)["card"] == _json(manifest.card)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise RefusedError(f"{source}: the card cannot be kept as JSON: {error}") from None
    if not same:
        raise RefusedError(f"{source}: the card holds values that change in JSON, such as NaN")
    if len(data) > MAX_MANIFEST:
        raise RefusedError(
            f"{source}: its manifest has {len(data):,} bytes; at most {MAX_MANIFEST:,} are kept"
        )
    return data


def _json(value: Any) -> Any:
    """Plain data as it comes back from JSON, where a tuple is a list."""
    if isinstance(value, Mapping):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def parse_manifest(source: str, data: bytes | memoryview) -> Manifest:
    """A manifest from its bytes. CorruptError, naming `source`, where it is not one."""
    if len(data) > MAX_MANIFEST:
        raise RefusedError(f"{source} has {len(data):,} bytes; at most {MAX_MANIFEST:,} are read")
    check_values(source, data)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptError(f"{source} is not an expert's manifest: {str(error)[:200]}") from None
    check_depth(source, manifest.card)
    check_card(source, manifest)
    return manifest


def assemble(source: str, manifest: Manifest, blob: memoryview) -> Packed:
    """The expert that `manifest` describes, over the bytes of its blob; the two must agree."""
    if len(blob) != manifest.blob.size:
        raise CorruptError(
            f"{source}: its file has {len(blob):,} bytes; its manifest says {manifest.blob.size:,}"
        )
    tensors = read_tensors(source, blob)
    said = {n: (t.dtype, t.shape) for n, t in manifest.tensors.items()}
    found = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    if said != found:
        wrong = sorted(n for n in said.keys() | found.keys() if said.get(n) != found.get(n))
        raise CorruptError(
            f"{source}: manifest and tensors differ in {len(wrong)} places, first "
            f"{brief(wrong[0])}: manifest {said.get(wrong[0])!s:.80}, tensors {found.get(wrong[0])}"
        )
    packed = Packed(manifest.kind, manifest.base, manifest.modules, tensors, manifest.card)
    check_structure(source, packed)
    return packed


def check_card(source: str, packed: Packed | Manifest) -> None:
    """The fields of a card that are used here have their types, and it names the same base."""
    card = packed.card
    for key in ("task", "description"):
        if not isinstance(card.get(key), str | None):
            raise CorruptError(f"{source}: the card's {key} is {card[key]!r:.80}, want text")
    pin = {} if card.get("base") is None else card["base"]
    if not isinstance(pin, Mapping) or any(
        not isinstance(pin.get(key), str | None) for key in ("id", "revision", "digest")
    ):
        raise CorruptError(
            f"{source}: the card's base is {pin!r:.80}, want id, revision and digest as text"
        )
    if not packed.base or pin.get("id") not in (None, packed.base):
        raise CorruptError(
            f"{source} is for the base {packed.base!r:.80}; its card says {pin.get('id')!r:.80}"
        )
    for key, text in {"base": packed.base, "revision": pin.get("revision") or ""}.items():
        if len(text) > MAX_BASE or not text.isprintable():
            raise RefusedError(
                f"{source}: its {key} has {len(text):,} characters, is over {MAX_BASE} long or not "
                f"printable: {brief(text, 80)}"
            )
    peft = {} if card.get("peft") is None else card["peft"]
    notes = peft.get("migrated", []) if isinstance(peft, Mapping) else None
    if not isinstance(notes, list | tuple) or any(not isinstance(note, str) for note in notes):
        raise CorruptError(f"{source}: the card's peft is {peft!r:.80}, want an object")


def check_structure(source: str, packed: Packed) -> None:
    """Each module has its two tensors, and a gate or none, of fitting shapes and dtypes, and
    nothing is left over."""
    check_card(source, packed)
    parts = _PARTS[packed.kind]
    wanted = {f"{module}.{part}" for module in packed.modules for part in parts}
    if not packed.modules:
        raise RefusedError(f"{source} adapts no module; it would change nothing")
    allowed = {f"{module}.{GATE}" for module in packed.modules}
    if odd := sorted(wanted ^ (packed.tensors.keys() - allowed)):
        where = "is missing" if odd[0] in wanted else "belongs to no module"
        raise CorruptError(f"{source}: tensor {brief(odd[0])} {where} ({len(odd)} such)")
    if packed.kind == "sparse":
        _check_sides(source, packed)
    for name, module in packed.modules.items():
        first, second = (packed.tensors[f"{name}.{part}"] for part in parts)
        d_out, d_in = module.shape
        fits = d_out > 0 and d_in > 0
        if packed.kind == "lora":
            fits = fits and module.rank is not None and module.rank > 0 and module.block is None
            fits = fits and module.scale is not None
            fits = fits and first.shape == (module.rank, d_in)
            fits = fits and second.shape == (d_out, module.rank)
            fits = fits and {first.dtype, second.dtype} <= FLOATS
        else:
            block = 1 if module.block is None else module.block
            fits = fits and module.rank is None and module.scale is None
            tail = () if block == 1 else (block, block)
            fits = fits and len(first.shape) == 1 and second.shape == (*first.shape, *tail)
            fits = fits and block in (1, 16) and d_out % block == d_in % block == 0
            fits = fits and first.dtype in ("I32", "I64") and second.dtype in FLOATS
        if not fits:
            raise CorruptError(
                f"{source}: {cut(name)} of shape {module.shape}, rank {module.rank}, scale "
                f"{module.scale}, block {module.block} does not go with tensors {first.dtype} "
                f"{first.shape} and {second.dtype} {second.shape}"
            )
        gate = packed.tensors.get(f"{name}.{GATE}")
        if gate is not None and (gate.dtype, gate.shape) != ("F32", (d_in,)):
            raise CorruptError(
                f"{source}: the gate of {cut(name)} is {gate.dtype} {gate.shape}, want F32 "
                f"{(d_in,)}"
            )


def _check_sides(source: str, packed: Packed) -> None:
    sides = sum(sum(module.shape) for module in packed.modules.values())
    entries = sum(packed.tensors[f"{name}.values"].params for name in packed.modules)
    if sides > MAX_SIDES + SIDES_PER_ENTRY * entries:
        raise RefusedError(
            f"{source} has {entries:,} entries in modules whose sides sum to {sides:,}; at most "
            f"{MAX_SIDES:,}, and {SIDES_PER_ENTRY} for each entry, are read"
        )


def check_content(source: str, packed: Packed) -> None:
    """No NaN or infinity, and positions of sparse experts inside the matrix and rising."""
    for name, module in packed.modules.items():
        if module.scale is not None and not math.isfinite(module.scale):
            raise RefusedError(
                f"{source}: the scale of {cut(name)} is {module.scale}; want a number"
            )
    for name, tensor in packed.tensors.items():
        finite = tensor.finite()
        release(tensor.data)
        if not finite:
            raise RefusedError(
                f"{source}: {cut(name)} holds NaN or infinity; routing to it would spoil every "
                "output",
                hint="train it again, or take an earlier checkpoint",
            )
    if packed.kind != "sparse":
        return
    for name, module in packed.modules.items():
        index = packed.tensors[f"{name}.index"].numpy()
        size = module.shape[0] * module.shape[1] // (module.block or 1) ** 2
        if index.size and (index[0] < 0 or index[-1] >= size or (np.diff(index) <= 0).any()):
            raise CorruptError(
                f"{source}: positions of {cut(name)} do not rise within 0..{size - 1}"
            )


def changes_nothing(packed: Packed) -> bool:
    """Whether every update is zero: a scale of 0, an untrained B, values that are all 0."""
    parts = _PARTS[packed.kind] if packed.kind == "lora" else ("values",)
    return all(
        module.scale == 0 or any(_is_zero(packed.tensors[f"{name}.{part}"]) for part in parts)
        for name, module in packed.modules.items()
    )


def _is_zero(tensor: RawTensor) -> bool:
    zero = not tensor.numpy().any()
    release(tensor.data)
    return zero


_TORCH_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_TORCH_NAMES |= {"int32": "I32", "int64": "I64"}


def to_raw(tensor: "torch.Tensor") -> RawTensor:
    """A tensor as bytes."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _TORCH_NAMES:
        raise RefusedError(
            f"a tensor of {dtype} cannot be kept; supported: {', '.join(_TORCH_NAMES)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return RawTensor(_TORCH_NAMES[dtype], tuple(tensor.shape), memoryview(data))


def to_tensor(raw: RawTensor) -> "torch.Tensor":
    """A tensor over the same memory."""
    import torch

    dtype = getattr(torch, {v: k for k, v in _TORCH_NAMES.items()}[raw.dtype])
    if not raw.data.nbytes:
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(raw.data, dtype=dtype).reshape(raw.shape)


def pack(expert: "Expert") -> Packed:
    """An expert as bytes."""
    from adaptlib.experts.lora import LoRADelta
    from adaptlib.experts.sparse import SparseDelta

    modules: dict[str, Module] = {}
    tensors: dict[str, RawTensor] = {}
    for name, delta in expert.deltas.items():
        if isinstance(delta, LoRADelta):
            modules[name] = Module(delta.shape, rank=delta.rank, scale=float(delta.scale))
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = to_raw(delta.a), to_raw(delta.b)
        elif isinstance(delta, SparseDelta):
            size = delta.shape[0] * delta.shape[1] // delta.block**2
            index = delta.index.int() if size < 2**31 else delta.index.long()
            modules[name] = Module(delta.shape, block=delta.block)
            tensors[f"{name}.index"], tensors[f"{name}.values"] = (
                to_raw(index),
                to_raw(delta.values),
            )
    tensors |= {f"{name}.{GATE}": to_raw(gate) for name, gate in expert.gates.items()}
    return Packed(expert.kind, expert.base, modules, tensors, dict(expert.card))


def unpack(packed: Packed) -> "Expert":
    """An expert as tensors, over the same memory."""
    from adaptlib.experts.expert import Expert

    parts = parts_of(packed.kind)
    deltas = {
        name: to_delta(module, *(packed.tensors[f"{name}.{part}"] for part in parts))
        for name, module in packed.modules.items()
    }
    return Expert(packed.base, deltas, packed.card, gates_of(packed.modules, packed.tensors))


def gates_of(
    modules: Mapping[str, Module], tensors: Mapping[str, RawTensor]
) -> "dict[str, torch.Tensor]":
    """The gates among an expert's tensors by module, over the same memory."""
    named = {module: f"{module}.{GATE}" for module in modules}
    return {module: to_tensor(tensors[name]) for module, name in named.items() if name in tensors}


def parts_of(kind: str) -> tuple[str, str]:
    """What the two tensors of a module are called, in the order of `to_delta`."""
    return _PARTS[kind]


def to_delta(module: Module, first: RawTensor, second: RawTensor) -> "Delta":
    """A delta over the same memory: of LoRA's A and B, or of a sparse one's index and values."""
    from adaptlib.experts.lora import LoRADelta
    from adaptlib.experts.sparse import SparseDelta

    if module.rank is not None:
        return LoRADelta(to_tensor(first), to_tensor(second), module.scale or 0.0)
    return SparseDelta(to_tensor(first), to_tensor(second), module.shape, module.block or 1)


def write_directory(packed: Packed, directory: Path) -> None:
    """Write an adaptlib directory: `expert.json` and `expert.safetensors`."""
    from library_store import Digest

    blob = b"".join(packed.blob())
    manifest = packed.manifest(str(Digest.of(blob)))
    write_files(directory, {BLOB_NAME: [blob], MANIFEST_NAME: [manifest.encode()]})


def write_files(directory: Path, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Write files into a directory, in this order, each complete under its name or not there.
    Where one fails none of them stays, nor a directory that was made for them."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, pieces in files.items():
            partial = directory / f".{name}.{os.getpid()}"
            written.append(partial)
            with partial.open("wb") as file:
                file.writelines(pieces)
            partial.replace(directory / name)
            written[-1] = directory / name
    except BaseException:
        for path in written:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # it is not empty, or was never made
                path.rmdir()
        raise


def read_directory(directory: Path, *, writable: bool = True) -> Packed:
    """Read an adaptlib directory. Tensors that are not `writable` take no memory to go through."""
    from library_store import Digest

    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise NotFoundError(f"{directory} has no {MANIFEST_NAME}")
    view = map_file(path)
    manifest = parse_manifest(str(path), view)
    parse_json(str(path), bytes(view))  # which also finds a key that is there twice
    blob = map_file(directory / BLOB_NAME, writable=writable)
    found = str(Digest.of(blob))
    release(blob)
    if found != manifest.blob.digest:
        raise CorruptError(
            f"{directory / BLOB_NAME} is not the file that {MANIFEST_NAME} was written for: its "
            f"digest is {found}, want {manifest.blob.digest:.80}"
        )
    return assemble(str(directory), manifest, blob)
