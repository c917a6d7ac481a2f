"""PEFT directories, in and out: LoRA and SHiRA.

    adapter_config.json           what PEFT needs to know
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight (r, d_in)
                                                           .lora_B.weight (d_out, r)
                                  base_model.model.<module>.shira_weight (n,)
                                                           .shira_indices (2, n)

lora_A and lora_B are this way round on Linear and on Conv1D (GPT-2, `fan_in_fan_out`) alike. The
config is kept whole in `card["peft"]["config"]`, so that what came from PEFT goes back as PEFT
wrote it. Reading and writing need no torch. A symbolic link is followed (the hub's cache is made of
them), to a regular file only.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adaptlib.errors import AdaptlibError, ConflictError, CorruptError, NotFoundError, RefusedError
from adaptlib.experts.base import base_id, describe, locate
from adaptlib.experts.codec import (
    GATE,
    Module,
    Packed,
    check_content,
    check_structure,
    pack,
    unpack,
    write_files,
)
from adaptlib.experts.peft_config import (
    CONFIG_NAME,
    MASK,
    LoRAConfig,
    inexact,
    lora_config,
    parse_config,
    read_config,
    scales,
    shira_config,
)
from adaptlib.experts.peft_keys import PREFIX, sort_keys
from adaptlib.experts.peft_shira import ShapeOf, read_modules, write_modules
from adaptlib.experts.tensors import (
    RawTensor,
    cut,
    encode,
    map_file,
    open_regular,
    read_tensors,
)

if TYPE_CHECKING:
    from adaptlib.experts.expert import Expert

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def read_peft(
    directory: str | Path,
    *,
    base: str | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> "Expert":
    """The expert in a PEFT directory; see `read_peft_packed`."""
    return unpack(read_peft_packed(Path(directory), base=base, shapes=shapes))


def read_peft_packed(
    directory: Path,
    *,
    base: str | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    writable: bool = True,
) -> Packed:
    """The expert in a PEFT directory, as bytes; see `read_directory` for `writable`.

    `base` is the id or path of the base model, in place of what the config names. `shapes` gives
    (d_out, d_in) by module, which only a SHiRA file with an unused last row or column needs;
    without it they are taken from the base model where that is on this machine. What was changed
    on the way is in `card["peft"]["migrated"]`, sentences for the reader.

    Raises NotFoundError (no config, no weights), CorruptError (not what it claims: truncated, a
    wrong type, ranks that differ from the config) and RefusedError (a pickle, or what an expert
    cannot hold: DoRA, embeddings, biases, whole modules, other kinds of adapters, NaN).
    """
    document = read_config(directory / CONFIG_NAME)
    config = parse_config(str(directory / CONFIG_NAME), document)
    weights = _weights(directory)
    source = str(weights)
    kind = "lora" if isinstance(config, LoRAConfig) else "sparse"
    tensors = read_tensors(source, map_file(weights, writable=writable))
    parts, notes = sort_keys(source, tensors, kind)

    name, base_notes = _base(directory, config.base_model_name_or_path, base)
    revision = None if base_notes else config.revision
    if isinstance(config, LoRAConfig):
        ranks = scales(str(directory / CONFIG_NAME), config, parts)
        modules, tensors = _read_lora(source, ranks, parts)
    else:
        shape_of = _shape_finder(shapes, name, revision)
        modules, tensors, shira_notes = read_modules(source, parts, config, shape_of)
        notes += shira_notes
    kept = {"config": document, "layout": _layout(modules)}
    migrated = [*notes, *base_notes]
    card: dict[str, Any] = {
        "base": {"id": name, "revision": revision, "digest": None},
        "peft": kept | ({"migrated": migrated} if migrated else {}),
    }
    if licence := _licence(directory / "README.md"):
        card["licence"] = licence
    packed = Packed(kind, name, dict(sorted(modules.items())), dict(sorted(tensors.items())), card)
    check_structure(source, packed)
    check_content(source, packed)
    return packed


def write_peft(
    expert: "Expert | Packed", directory: str | Path, *, fan_in_fan_out: bool | None = None
) -> list[str]:
    """Write a directory that `PeftModel.from_pretrained` loads; returns notes for the reader.

    An unchanged import gives back its tensors and config as they were. For any other expert a
    config is made: the rank and alpha of each module are exact (but see `peft_config._alpha`), and
    blocks become single SHiRA entries. `fan_in_fan_out` says whether the base keeps its weights as
    (d_in, d_out), as GPT-2's Conv1D does; PEFT corrects a wrong one with a warning. Nothing is
    written on an error.

    Raises RefusedError for a sparse expert that SHiRA cannot hold, ConflictError where `directory`
    is a file.
    """
    packed = expert if isinstance(expert, Packed) else pack(expert)
    directory, document = Path(directory), _original(packed)
    pin = packed.card.get("base")
    revision = pin.get("revision") if isinstance(pin, Mapping) else None
    if packed.kind == "lora":
        tensors, notes = _lora_tensors(packed), list[str]()
        if document is None:
            document = lora_config(packed.modules, packed.base, revision, _flag(packed))
            if near := inexact(packed.modules):
                notes.append(f"{len(near)} scales are no alpha/r; the nearest are off by 1e-16")
        if fan_in_fan_out is not None:
            document |= {"fan_in_fan_out": fan_in_fan_out}
    else:
        if fan_in_fan_out:
            raise RefusedError("PEFT's SHiRA adapts nn.Linear only, not this base model's Conv1D")
        r, pairs, notes = write_modules(
            packed.modules, packed.tensors, r=document["r"] if document else None
        )
        tensors = {f"{PREFIX}{n}.{part}": t for n, pair in pairs for part, t in pair.items()}
        if document is None:
            document = shira_config(packed.modules, packed.base, revision, r)
    if gates := sum(name.endswith(f".{GATE}") for name in packed.tensors):
        notes.append(f"{gates} gates are left out: PEFT has no place for them")
    if base_id(str(document.get("base_model_name_or_path"))) != packed.base:
        document |= {"base_model_name_or_path": packed.base, "revision": revision}
    _write(directory, document, tensors)
    return notes


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return path
    for name in PICKLE_NAMES:
        if (directory / name).exists():
            raise RefusedError(
                f"{directory} has its weights in {name} only, a pickle; loading it can run code",
                hint="save it again with a current PEFT: save_pretrained writes safetensors",
            )
    raise NotFoundError(f"{directory} has a {CONFIG_NAME} but no {WEIGHTS_NAME}")


def _read_lora(
    source: str,
    ranks: Mapping[str, tuple[int, float]],
    parts: Mapping[str, dict[str, RawTensor]],
) -> tuple[dict[str, Module], dict[str, RawTensor]]:
    modules: dict[str, Module] = {}
    tensors: dict[str, RawTensor] = {}
    for name, (rank, scale) in ranks.items():
        a, b = parts[name]["lora_A"], parts[name]["lora_B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or 0 in a.shape + b.shape:
            if min(len(a.shape), len(b.shape)) > 2:
                raise RefusedError(
                    f"{source}: {cut(name)} is no linear module: lora_A {list(a.shape)}, "
                    f"lora_B {list(b.shape)}"
                )
            raise CorruptError(
                f"{source}: {cut(name)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                "want [r, d_in] and [d_out, r]",
                hint="gather the shards (DeepSpeed ZeRO-3, FSDP) before save_pretrained",
            )
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CorruptError(
                f"{source}: {cut(name)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                f"{CONFIG_NAME} gives it rank {rank}"
            )
        modules[name] = Module((b.shape[0], a.shape[1]), rank=rank, scale=scale)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    return modules, tensors


def _shape_finder(
    given: Mapping[str, tuple[int, int]] | None, base: str, revision: str | None
) -> ShapeOf:
    """(d_out, d_in) of a module, or None where nobody here knows. Loads no weights, and torch only
    when it is asked."""

    @cache
    def known() -> Mapping[str, tuple[int, int]]:
        if given is not None:
            return given
        where = locate(base, revision=revision)
        return describe(where, base).modules if where else {}

    return lambda module: known().get(module)


def _base(directory: Path, named: str | None, told: str | None) -> tuple[str, list[str]]:
    """The id of the base model, and a note where the caller's word stands against the config's."""
    if told:
        told = base_id(told)
        if named and base_id(named) != told:
            return told, [f"{CONFIG_NAME} names the base {named}; it is {told}, as asked"]
        return told, []
    if not named:
        raise RefusedError(
            f"{directory / CONFIG_NAME} names no base model (base_model_name_or_path)",
            hint="say which one it is for: --base NAME",
        )
    return base_id(named), []


def _licence(readme: Path) -> str | None:
    """The `license` of a model card's front matter, where it is a plain word."""
    try:
        with open_regular(readme) as file:
            text = file.read(1 << 16).decode("utf-8", "replace")
    except (NotFoundError, RefusedError):
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    line = r"^license:[ \t]*[\"']?([\w.+-]{1,64})[\"']?[ \t]*\r?$"
    word = re.search(line, front[1], re.MULTILINE) if front else None
    return word[1] if word else None


def _layout(names: Iterable[str]) -> str:
    """A short digest of the module names: the kept config is for these and no others."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def _original(packed: Packed) -> dict[str, Any] | None:
    """The config that this expert came with, where it still describes it."""
    kept = _kept(packed)
    document = kept.get("config")
    if not isinstance(document, Mapping) or kept.get("layout") != _layout(packed.modules):
        return None
    try:
        config = parse_config("the card", document)
        if isinstance(config, LoRAConfig) != (packed.kind == "lora"):
            return None
        if isinstance(config, LoRAConfig):
            now = {name: (module.rank, module.scale) for name, module in packed.modules.items()}
            same = scales("the card", config, packed.modules) == now
        else:
            same = config.mask_type != MASK and all(
                packed.tensors[f"{name}.values"].shape == (config.r * sum(module.shape),)
                for name, module in packed.modules.items()
            )
    except AdaptlibError:  # a card that was written by hand
        return None
    return dict(document) if same else None


def _kept(packed: Packed) -> Mapping[str, Any]:
    kept = packed.card.get("peft")
    return kept if isinstance(kept, Mapping) else {}


def _flag(packed: Packed) -> bool:
    """`fan_in_fan_out` of the config that the expert once came with."""
    document = _kept(packed).get("config")
    return isinstance(document, Mapping) and document.get("fan_in_fan_out") is True


def _lora_tensors(packed: Packed) -> dict[str, RawTensor]:
    return {
        f"{PREFIX}{name}.{theirs}.weight": packed.tensors[f"{name}.{ours}"]
        for name in packed.modules
        for theirs, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b"))
    }


def _write(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, RawTensor]) -> None:
    """Both files or neither; the config last."""
    if directory.exists() and not directory.is_dir():
        raise ConflictError(f"{directory} is a file; want a directory")
    text = msgspec.json.format(msgspec.json.encode(document, order="sorted"), indent=2)
    write_files(directory, {WEIGHTS_NAME: encode(tensors), CONFIG_NAME: [text]})
