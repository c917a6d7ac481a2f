"""Hostile adapters and experts: one entry each, made by code and never kept as a file.

An entry writes into a directory and gives the words of a command, `add` of that directory for most.
`codes` are the exit codes that fit.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.make import (
    CONFIG,
    MODULE,
    A,
    B,
    adapter,
    blob,
    entry,
    expert,
    file,
    manifest,
    pair,
    shira,
    tensors,
)
from tests.hostile.watch import MARK

MiB = 1 << 20
CORRUPT, REFUSED, ABSENT = 4, 7, 3
EITHER = (CORRUPT, REFUSED)


@dataclass(frozen=True)
class Entry:
    """`make` writes the files into a directory that is there."""

    make: Callable[[Path], Any]
    codes: tuple[int, ...]


def _weights(data: bytes | Callable[[], bytes], *codes: int) -> Entry:
    """An adapter with this file of weights beside an honest config."""
    return Entry(
        lambda folder: adapter(folder, weights=data() if callable(data) else data), codes or EITHER
    )


def _config(changes: Any, *codes: int) -> Entry:
    """An adapter with these changes to its config, or with this text, beside honest weights."""
    return Entry(lambda folder: adapter(folder, changes), codes or EITHER)


def _expert(*codes: int, **changes: Any) -> Entry:
    return Entry(lambda folder: expert(folder, **changes), codes or EITHER)


def _one(**changes: Any) -> bytes:
    """A file of one tensor of 4 bytes whose entry is changed."""
    return file({"a": entry(0, 4) | changes}, bytes(4))


def _named(name: str) -> bytes:
    return file({name: entry(0, 4)}, bytes(4))


def _text(text: bytes, data: bytes = bytes(4)) -> bytes:
    return file(text, data)


PLAIN = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

HEADERS: dict[str, Entry] = {
    "nothing": _weights(b""),
    "seven-bytes": _weights(bytes(7)),
    "length-beyond-the-file": _weights(file({}, length=1000)),
    "length-of-16-MiB-and-one": _weights(lambda: file(b" " * (16 * MiB + 1))),
    "length-of-2-to-64": _weights(file(b"{}", length=2**64 - 1)),
    "length-of-2-to-63": _weights(file(b"{}", length=2**63)),
    "length-negative-as-signed": _weights(file(b"{}", length=2**64 - 8)),
    "padded-with-16-MiB-of-spaces": _weights(lambda: _text(b"{" + b" " * (16 * MiB - 9))),
    "no-brace": _weights(_text(b"[]")),
    "space-before-the-brace": _weights(_text(b' {"a":' + PLAIN + b"}")),
    "byte-order-mark": _weights(_text(b'\xef\xbb\xbf{"a":' + PLAIN + b"}")),
    "not-UTF-8": _weights(_text(b'{"\xff\xfe":' + PLAIN + b"}")),
    "overlong-UTF-8": _weights(_text(b'{"\xc0\xaf":' + PLAIN + b"}")),
    "UTF-16": _weights(_text('{"a":{}}'.encode("utf-16"))),
    "name-twice": _weights(_text(b'{"a":' + PLAIN + b',"a":' + PLAIN + b"}")),
    "name-twice-by-escape": _weights(_text(b'{"a":' + PLAIN + b',"\\u0061":' + PLAIN + b"}")),
    "key-twice": _weights(
        _text(b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}')
    ),
    "NaN": _weights(_text(b'{"a":NaN}')),
    "minus-infinity": _weights(_text(b'{"a":{"dtype":"F32","shape":[-Infinity]}}')),
    "integer-of-5000-digits": _weights(_text(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}")),
    "integers-of-4000-digits": _weights(_one(shape=[10**3999] * 8)),
    "offsets-as-floats": _weights(_one(data_offsets=[0.0, 4.0])),
    "offset-of-minus-zero": _weights(
        _text(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}')
    ),
    "offsets-negative": _weights(_one(data_offsets=[-4, 0])),
    "offsets-as-text": _weights(_one(data_offsets=["0", "4"])),
    "offsets-true": _weights(_one(data_offsets=[False, 4])),
    "offsets-backwards": _weights(_one(data_offsets=[4, 0])),
    "offsets-of-three": _weights(_one(data_offsets=[0, 4, 4])),
    "overlap": _weights(file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))),
    "hole": _weights(file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))),
    "trailing-bytes": _weights(file({"a": entry(0, 4)}, bytes(5))),
    "data-missing": _weights(file({"a": entry(0, 8)}, bytes(4))),
    "shape-negative": _weights(_one(shape=[-1, -1])),
    "shape-overflows-64-bits": _weights(_one(shape=[2**33, 2**31])),
    "shape-of-2-to-63": _weights(_one(shape=[2**63])),
    "shape-empty-but-huge": _weights(file({"a": entry(0, 0, [0, 2**62, 2**62])})),
    "shape-null": _weights(_one(shape=None)),
    "nine-axes": _weights(_one(shape=[1] * 9)),
    "dtype-unknown": _weights(_one(dtype="evil")),
    "dtype-F8": _weights(file({"a": entry(0, 1, [1], "F8_E4M3")}, bytes(1))),
    "dtype-F4-odd": _weights(file({"a": entry(0, 2, [3], "F4")}, bytes(2))),
    "dtype-of-10-MB": _weights(lambda: _one(dtype="x" * 10**7)),
    "dtype-nested": _weights(_one(dtype=[[["F32"]]])),
    "entry-with-more-fields": _weights(_one(code=f"import {MARK}")),
    "entries-of-nothing": _weights(lambda: _text(b'{"a":{' + b'"":0,' * 10**6 + b'"b":0}}')),
    "one-million-empty-tensors": _weights(
        lambda: file(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)
            )
            + b"}"
        )
    ),
    "65537-tensors": _weights(lambda: file({str(i): entry(0, 0, [0]) for i in range(65_537)})),
    "65536-tensors-and-a-byte": _weights(
        lambda: file(
            b"{"
            + b",".join(
                b'"a.%d":{"dtype":"F32","shape":[0,0,0,0,0,0,0,0],"data_offsets":[0,0]}' % i
                for i in range(65_536)
            )
            + b"}",
            b"x",
        ),
        CORRUPT,
    ),
    "three-million-strings": _weights(lambda: _text(b'{"a":["' + b'ab","' * 3_300_000 + b'"]}')),
    "one-million-lists": _weights(lambda: _text(b'{"a":[[]' + b",[]" * 10**6 + b"]}")),
    "wide-characters": _weights(
        lambda: _text('{"\U0001f600":["ab'.encode() + b'","ab' * 500_000 + b'"]}')
    ),
    "nested-lists": _weights(_text(b'{"a":' + b"[" * 200_000)),
    "nested-objects": _weights(_text(b'{"a":' * 50_000)),
    "name-empty": _weights(_named("")),
    "name-of-513": _weights(_named("a" * 513)),
    "name-with-control-characters": _weights(_named("a\x1b[2J\x07")),
    "name-with-C1-control": _weights(_named("a\x9b2J")),
    "name-with-bidi": _weights(_named("a\u202eb")),
    "name-is-a-path": _weights(lambda: _path_name("../../../../tmp/evil")),
    "name-is-absolute": _weights(lambda: _path_name("/etc/passwd")),
    "name-is-a-windows-path": _weights(lambda: _path_name("C:\\evil")),
    "name-with-NUL": _weights(_named("a\0b")),
    "name-half-a-pair": _weights(_text(b'{"\\ud800":' + PLAIN + b"}")),
    "names-that-are-slow-to-search": _weights(lambda: _slow_names()),
    "metadata-a-number": _weights(file({"__metadata__": 5, "a": entry(0, 4)}, bytes(4))),
    "metadata-of-lists": _weights(file({"__metadata__": {"a": []}, "a": entry(0, 4)}, bytes(4))),
    "metadata-huge": _weights(
        lambda: _text(b'{"__metadata__":{' + b'"a":"",' * 800_000 + b'"b":""},"a":' + PLAIN + b"}")
    ),
    "tensors-NaN": _weights(
        lambda: tensors(pair() | {A: np.full((2, 6), np.nan, np.float32)}), REFUSED
    ),
    "rank-of-2-to-40-by-empty": _weights(
        lambda: file({A: entry(0, 0, [2**40, 0]), B: entry(0, 0, [0, 2**40])}), CORRUPT
    ),
}


def _path_name(path: str) -> bytes:
    a, b = pair().values()
    name = f"base_model.model.{path}"
    return tensors({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})


def _slow_names() -> bytes:
    stem = "embed" * 95
    header = {f"{stem}{i:05}.lora_A.weight": entry(0, 0, [0, 2]) for i in range(25_000)}
    return file(header)


def _truncated(path: Path, size: int) -> None:
    with path.open("r+b") as opened:
        opened.truncate(size)


def _in_place_of(
    name: str, make: Callable[[Path], Any], *, of: Callable[..., Any] = adapter
) -> Any:
    """An honest adapter but for one file, in whose place there is something else."""

    def write(folder: Path) -> None:
        of(folder)
        (folder / name).unlink()
        make(folder / name)

    return write


WEIGHTS, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"

FILES: dict[str, Entry] = {
    "weights-a-pipe": Entry(_in_place_of(WEIGHTS, os.mkfifo), (ABSENT, REFUSED)),
    "weights-a-directory": Entry(_in_place_of(WEIGHTS, Path.mkdir), (ABSENT, REFUSED)),
    "weights-endless": Entry(
        _in_place_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), (ABSENT, REFUSED)
    ),
    "weights-a-link-to-itself": Entry(
        _in_place_of(WEIGHTS, lambda path: path.symlink_to(path)), (ABSENT, REFUSED)
    ),
    "weights-a-link-to-passwd": Entry(
        _in_place_of(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")), EITHER
    ),
    "weights-of-a-sparse-terabyte": Entry(
        lambda folder: _truncated(adapter(folder) / WEIGHTS, 1 << 40), EITHER
    ),
    "config-a-pipe": Entry(_in_place_of(CONFIG_NAME, os.mkfifo), (ABSENT, REFUSED)),
    "config-endless": Entry(
        _in_place_of(CONFIG_NAME, lambda path: path.symlink_to("/dev/zero")), (ABSENT, REFUSED)
    ),
    "config-a-link-to-itself": Entry(
        _in_place_of(CONFIG_NAME, lambda path: path.symlink_to(path)), (ABSENT, REFUSED)
    ),
    "config-of-a-gigabyte": Entry(
        lambda folder: _truncated(adapter(folder) / CONFIG_NAME, 1 << 30), EITHER
    ),
    "manifest-a-pipe": Entry(_in_place_of("expert.json", os.mkfifo, of=expert), (ABSENT, REFUSED)),
    "manifest-of-100-MB": Entry(
        lambda folder: _truncated(expert(folder) / "expert.json", 10**8), EITHER
    ),
    "blob-a-pipe": Entry(
        _in_place_of("expert.safetensors", os.mkfifo, of=expert), (ABSENT, REFUSED)
    ),
    "blob-endless": Entry(
        _in_place_of("expert.safetensors", lambda path: path.symlink_to("/dev/zero"), of=expert),
        (ABSENT, REFUSED),
    ),
}

# Regular expressions that do not end, or cost more than they seem to.
_PATTERNS = {
    "nested-repeat": "(a+)+$",
    "alternatives-repeated": "(a|a)*$",
    "class-repeated": "([a-z_.]+)+[0-9]",
    "many-repeats": ".*" * 8 + "x",
    "many-groups": "(a|a)" * 40,
    "many-options": "a?" * 60 + "x",
    "counted": "(?:a{1,50}){1,50}x",
    "lookahead": "(?=(a+))a*b\\1",
    "case-folding-range": "(?i:[\\0-\U0010ffff])" * 20,
    "invalid": "(((",
    "long": "x" * 600 + ".*",
    "conditional": "(a)?(?(1)b|c)" * 20,
}


def _pattern(field: str, pattern: str) -> Entry:
    """On a module whose name is long and of one letter."""

    def write(folder: Path) -> None:
        a, b = pair().values()
        name = f"base_model.model.{'a' * 400}"
        weights = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        adapter(folder, {field: {pattern: 2}}, tensors(weights))

    return Entry(write, EITHER)


CONFIGS: dict[str, Entry] = {
    "config-not-JSON": _config(b"{'r': 8}", CORRUPT),
    "config-python": _config(f"__import__('{MARK}')".encode(), CORRUPT),
    "config-a-list": _config(b"[]", CORRUPT),
    "config-nested": _config(b'{"a":' + b"[" * 100_000, CORRUPT),
    "config-nested-100": _config({"x": json.loads("[" * 100 + "]" * 100)}, REFUSED),
    "config-key-twice": _config(b'{"peft_type":"LORA","r":8,"r":9,"lora_alpha":1}', REFUSED),
    "config-NaN": _config(json.dumps(CONFIG | {"x": float("nan")}).encode(), CORRUPT),
    "config-infinite": _config(json.dumps(CONFIG).replace("4", "1e999").encode()),
    "config-integer-of-5000-digits": _config(b'{"x":' + b"9" * 5000 + b"}", CORRUPT),
    "config-half-a-pair": _config({"x": "\ud800"}, REFUSED),
    "config-of-2-MB": _config({"x": "a" * 2_000_000}, REFUSED),
    "config-of-a-million-values": _config(b'{"x":[' + b"0," * 500_000 + b"0]}", CORRUPT),
    **{
        f"config-r-{name}": _config({"r": value}, CORRUPT)
        for name, value in {
            "zero": 0,
            "negative": -1,
            "billion": 10**9,
            "text": "8",
            "true": True,
            "float": 2.5,
            "null": None,
            "list": [2],
            "of-63-bits": 2**63 - 1,
            "of-4000-digits": 10**4000,
        }.items()
    },
    **{
        f"config-alpha-{name}": _config({"lora_alpha": value}, *EITHER)
        for name, value in {
            "text": "4",
            "list": [4],
            "null": None,
            "true": True,
            "of-4000-digits": 10**4000,
        }.items()
    },
    **{
        f"config-{field}-{type(value).__name__}": _config({field: value}, *EITHER)
        for field, value in {
            "peft_type": 5,
            "use_rslora": "yes",
            "rank_pattern": [1],
            "alpha_pattern": "a",
            "init_lora_weights": 3,
            "bias": {},
            "base_model_name_or_path": 7,
            "revision": [],
        }.items()
    },
    "config-peft_type-unknown": _config({"peft_type": MARK}, REFUSED),
    "config-peft_type-of-500-kB": _config({"peft_type": "x" * 500_000}, REFUSED),
    "config-imports": _config(
        {
            "auto_mapping": {"base_model_class": "system", "parent_library": MARK},
            "megatron_core": MARK,
            "modules_to_save": ["score"],
        },
        REFUSED,
    ),
    "config-loftq-path": _config(
        {"init_lora_weights": "loftq", "loftq_config": {"p": MARK}}, REFUSED
    ),
    "config-dora": _config({"use_dora": True}, REFUSED),
    "config-base-null": _config({"base_model_name_or_path": None}, REFUSED),
    "config-base-with-escapes": _config({"base_model_name_or_path": "\x1b]0;evil\x07"}, REFUSED),
    "config-base-of-100-kB": _config({"base_model_name_or_path": "a" * 100_000}, REFUSED),
    "config-base-with-newline": _config({"base_model_name_or_path": "a\nNext: rm -rf /"}, REFUSED),
    "config-revision-with-escapes": _config({"revision": "\x1b[2J"}, REFUSED),
    "config-ranks-by-the-thousand": _config({"rank_pattern": {f".{i}": 2 for i in range(60_000)}}),
    **{f"config-rank_pattern-{n}": _pattern("rank_pattern", p) for n, p in _PATTERNS.items()},
    **{f"config-alpha_pattern-{n}": _pattern("alpha_pattern", p) for n, p in _PATTERNS.items()},
    "shira-positions-twice": Entry(
        lambda folder: shira(folder, shira_indices=np.zeros((2, 10), np.int32)), EITHER
    ),
    "shira-positions-negative": Entry(
        lambda folder: shira(folder, shira_indices=np.full((2, 10), -1, np.int32)), (CORRUPT,)
    ),
    "shira-positions-huge": Entry(
        lambda folder: shira(folder, shira_indices=np.full((2, 10), 2**31 - 1, np.int32)),
        (CORRUPT,),
    ),
    "shira-positions-NaN": Entry(
        lambda folder: shira(folder, shira_indices=np.full((2, 10), np.nan, np.float32)),
        (CORRUPT,),
    ),
    "shira-r-zero": Entry(lambda folder: shira(folder, {"r": 0}), (CORRUPT,)),
}


def _modules(**changes: Any) -> dict[str, Any]:
    return {MODULE: {"shape": [4, 6], "rank": 2, "scale": 2.0} | changes}


def _sparse(shape: list[int], count: int = 1) -> Callable[[Path], Any]:
    """A sparse expert whose modules say that they are of this shape, with one entry in each."""

    def write(folder: Path) -> None:
        names = [f"m{i}" for i in range(count)]
        arrays = {}
        for name in names:
            arrays |= {
                f"{name}.index": np.zeros(1, np.int64),
                f"{name}.values": np.ones(1, np.float32),
            }
        data = tensors(arrays)
        expert(
            folder,
            data=data,
            kind="sparse",
            modules={name: {"shape": [side + i for side in shape]} for i, name in enumerate(names)},
            tensors={
                f"{name}.{part}": {"dtype": dtype, "shape": [1]}
                for name in names
                for part, dtype in (("index", "I64"), ("values", "F32"))
            },
        )

    return write


def _card(**fields: Any) -> dict[str, Any]:
    return manifest(b"")["card"] | fields


EXPERTS: dict[str, Entry] = {
    "manifest-nothing": _expert(text=b""),
    "manifest-schema-unknown": _expert(schema="adaptlib.expert/9"),
    "manifest-kind-unknown": _expert(kind=MARK),
    "manifest-kind-of-1-MB": _expert(kind="x" * 10**6),
    "manifest-with-more-fields": _expert(exec=f"import {MARK}"),
    "manifest-field-of-1-MB": _expert(**{"x" * 10**6: 1}),
    "manifest-key-twice": Entry(
        lambda folder: expert(
            folder, json.dumps(manifest(blob())).replace('"kind"', '"kind":"lora","kind"').encode()
        ),
        EITHER,
    ),
    "manifest-digest-a-path": _expert(blob={"digest": "../../etc/passwd", "size": 1}),
    "manifest-digest-of-something-else": _expert(
        blob={"digest": "sha256:" + "0" * 64, "size": len(blob())}
    ),
    "manifest-digest-upper-case": _expert(
        blob={"digest": manifest(blob())["blob"]["digest"].upper(), "size": len(blob())}
    ),
    "manifest-size-lies": _expert(blob=manifest(blob())["blob"] | {"size": 10**15}),
    "manifest-size-negative": _expert(blob=manifest(blob())["blob"] | {"size": -1}),
    "manifest-size-beyond-64-bits": _expert(blob=manifest(blob())["blob"] | {"size": 10**4000}),
    "manifest-size-of-5000-digits": Entry(
        lambda folder: expert(
            folder,
            json.dumps(manifest(blob())).replace('"size": ', '"size": ' + "9" * 5000).encode(),
        ),
        EITHER,
    ),
    "manifest-shape-negative": _expert(modules=_modules(shape=[-4, 6])),
    "manifest-shape-huge": _expert(modules=_modules(shape=[2**62, 2**62])),
    "manifest-rank-lies": _expert(modules=_modules(rank=10**9)),
    "manifest-scale-text": _expert(modules=_modules(scale="2")),
    "manifest-scale-infinite": Entry(
        lambda folder: expert(
            folder, json.dumps(manifest(blob())).replace("2.0", "1e999").encode()
        ),
        EITHER,
    ),
    "manifest-module-a-path": _expert(modules={"../../evil": {"shape": [4, 6]}}),
    "manifest-no-modules": _expert(modules={}),
    "manifest-tensor-of-another-dtype": _expert(
        tensors={f"{MODULE}.lora_a": {"dtype": "x" * 10**5, "shape": [2, 6]}}
    ),
    "manifest-base-with-escapes": _expert(base="\x1b[2J", card={}),
    "manifest-base-of-another-card": _expert(base="org/other"),
    "manifest-base-of-1-MB": _expert(base="a" * 10**6, card={}),
    "card-a-list": _expert(card=[]),
    "card-nested": _expert(card=_card(x=json.loads("[" * 70 + "]" * 70))),
    "card-nested-without-end": Entry(
        lambda folder: expert(
            folder,
            json.dumps(manifest(blob()))
            .replace('"card": {', '"card": {"x":' + "[" * 10**5)
            .encode(),
        ),
        EITHER,
    ),
    "card-of-17-MB": _expert(card=_card(x="a" * (17 * MiB))),
    "card-of-two-million-values": _expert(card=_card(x=[0] * 2_000_000)),
    "card-of-many-strings": _expert(card=_card(x=["ab"] * 1_000_000)),
    "card-half-a-pair": Entry(
        lambda folder: expert(
            folder,
            json.dumps(manifest(blob())).replace('"card": {', '"card": {"x":"\\ud800",').encode(),
        ),
        EITHER,
    ),
    "card-task-a-number": _expert(card=_card(task=5)),
    "card-base-a-list": _expert(card=_card(base=[])),
    "card-base-id-a-number": _expert(card=_card(base={"id": 5})),
    "card-revision-with-escapes": _expert(card=_card(base={"id": "org/base", "revision": "\x9b"})),
    "card-notes-a-number": _expert(card=_card(peft={"migrated": 5})),
    "sparse-of-a-trillion": Entry(_sparse([10**12, 10**6]), EITHER),
    "sparse-of-a-billion-rows": Entry(_sparse([2**31 - 1, 1]), EITHER),
    "sparse-of-many-widths": Entry(_sparse([100_000, 100_000], 500), EITHER),
}

ENTRIES: dict[str, Entry] = {**HEADERS, **FILES, **CONFIGS, **EXPERTS}
