"""A fuzzer of what reads bytes from strangers: headers, JSON, manifests and PEFT's configs.

    python tests/hostile/fuzz_header.py --inputs 1000000 --seed 0

Valid inputs are mutated, and others made at random that are nearly valid. A finding is an error
that is not adaptlib's own, an input that takes more than SLOW seconds, or one that is accepted here
and that the safetensors package refuses or reads otherwise. Each is printed with its bytes; the
exit code is then 1. One seed gives the same inputs everywhere.
"""
# ruff: noqa: E402  -- run as a script, it has to say first where the tests are

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [] if __package__ else [str(Path(__file__).parents[2])]

import safetensors

from adaptlib.errors import AdaptlibError
from adaptlib.experts.codec import encode_manifest, parse_manifest
from adaptlib.experts.peft_config import parse_config, parse_document, scales
from adaptlib.experts.peft_keys import sort_keys
from adaptlib.experts.tensors import DTYPES, parse_json, read_tensors
from tests.hostile import make

SLOW = 2.0  # seconds
NUMBERS = [
    *("0", "1", "2", "3", "4", "8", "16", "24", "40", "48", "255", "65536", "2147483648"),
    *("4294967296", "9007199254740993", "4611686018427387904", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 4400),
    *("-1", "-0", "1.0", "1e2", "1e-9", "1E400", "-1e999", "00", "0x10", "NaN", "Infinity"),
    *("true", "false", "null"),
]
STRINGS = [
    '""', '"a"', '"b"', '"F32"', '"F16"', '"BF16"', '"I64"', '"U8"', '"F8_E4M3"', '"f32"',
    '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"\\u0061"', '"\\ud800"',
    '"\\ud83d\\ude00"', '"\\u0000"', '"\\n"', '"é"', '"\u202e"', '"\x7f"', '"' + "a" * 520 + '"',
    '"../../etc/passwd"', '"LORA"', '"SHIRA"', '"(a+)+$"', '".*.*"', '"[a-z]*q"', '"(?i:x)"', '"r"',
    '"rank_pattern"', '"alpha_pattern"', '"lora_alpha"', '"sha256:' + "0" * 64 + '"', '"org/base"',
]  # fmt: skip
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"',
    b"\\",
    b" ",
    b"\n",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\0",
]
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|[\[\]{}:,]')


class Finding(NamedTuple):
    what: str
    target: str
    data: bytes


class Result(NamedTuple):
    """How many inputs each target took, by what became of them, and what was found."""

    outcomes: Counter[str]
    findings: list[Finding]
    seconds: float


# -- the targets ----------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """A safetensors file. What is accepted, safetensors must read alike."""
    tensors = read_tensors("fuzz", memoryview(data))
    theirs = dict(safetensors.deserialize(data))
    if theirs.keys() != tensors.keys():
        raise AssertionError(f"safetensors reads other names: {sorted(theirs)[:5]}")
    for name, tensor in tensors.items():
        other = theirs[name]
        same = (other["dtype"], tuple(other["shape"])) == (tensor.dtype, tensor.shape)
        if not same or bytes(other["data"]) != bytes(tensor.data):
            raise AssertionError(f"safetensors reads {name!r} otherwise: {other!r:.100}")
    with suppress(AdaptlibError):
        sort_keys("fuzz", tensors, "lora")


def document(data: bytes) -> None:
    """Any JSON."""
    parse_json("fuzz", data)


def manifest(data: bytes) -> None:
    """A manifest. What is accepted is accepted again when it is written."""
    found = parse_manifest("fuzz", data)
    _ = found.params, found.rank, found.gates
    if parse_manifest("fuzz", encode_manifest("fuzz", found)) != found:
        raise AssertionError("it is another manifest when it is written and read again")


def config(data: bytes) -> None:
    """An adapter_config.json, and its patterns on a few names."""
    parsed = parse_config("fuzz", parse_document("fuzz", data))
    if hasattr(parsed, "rank_pattern"):
        scales("fuzz", parsed, {make.MODULE: 0, "a" * 300: 0, "lm_head": 0})  # type: ignore[arg-type]


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "json": document,
    "manifest": manifest,
    "config": config,
}


def seeds() -> dict[str, list[bytes]]:
    """Valid inputs for each target."""
    import numpy as np

    many = {f"m.{i}.w": np.zeros((i % 3, 2), np.float32) for i in range(6)}
    config = json.dumps(make.CONFIG | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*": 3}})
    shira = json.dumps({"peft_type": "SHIRA", "r": 1, "base_model_name_or_path": "org/base"})
    data = make.blob()
    return {
        "header": [
            data,
            make.tensors(make.pair()),
            make.tensors(many),
            make.file({"__metadata__": {"format": "pt"}, "a": make.entry(0, 8)}, bytes(8)),
            make.file({}),
        ],
        "json": [config.encode(), b'{"a": [1, 2.5, null, {"b": "c"}]}', b"[[[]]]", b'"x"'],
        "manifest": [json.dumps(make.manifest(data)).encode()],
        "config": [config.encode(), shira.encode(), json.dumps(make.CONFIG).encode()],
    }


# -- making inputs --------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random, *, framed: bool) -> bytes:
    """One to four changes; where it is framed, the length in front follows, mostly."""
    front, body = (data[:8], data[8:]) if framed else (b"", data)
    length = int.from_bytes(front, "little")
    text, rest = (body[:length], body[length:]) if framed else (body, b"")
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        text = _changed(text, rng)
    if not framed:
        return text
    kind = rng.random()
    if kind < 0.06:
        rest = rest[: rng.randrange(len(rest) + 1)] + rng.randbytes(rng.randrange(9))
    said = len(text)
    if kind > 0.96:
        said = rng.choice(
            (0, 1, said - 1, said + 1, 1 << 24, (1 << 24) + 1, 1 << 63, (1 << 64) - 1)
        )
    return max(0, said).to_bytes(8, "little") + text + rest


def _changed(text: bytes, rng: random.Random) -> bytes:
    how = rng.randrange(8)
    place = rng.randrange(len(text) + 1)
    if how == 0:  # a bit
        if place < len(text):
            return text[:place] + bytes([text[place] ^ 1 << rng.randrange(8)]) + text[place + 1 :]
        return text
    if how == 1:
        return text[:place] + rng.choice(PIECES) * rng.choice((1, 1, 2, 70, 300)) + text[place:]
    if how == 2:
        return text[:place] + text[place + rng.randrange(1, 20) :]
    if how == 3:  # a part again, somewhere else
        other = rng.randrange(len(text) + 1)
        return text[:place] + text[other : other + rng.randrange(1, 90)] + text[place:]
    tokens = list(_TOKEN.finditer(text))
    if not tokens:
        return text + rng.choice(PIECES)
    found = rng.choice(tokens)
    pool = STRINGS if found[0].startswith(b'"') and rng.random() < 0.8 else NUMBERS + STRINGS
    if how == 4:  # another value
        new = rng.choice(pool).encode()
    elif how == 5 and found[0].isdigit():  # a number nearby, or written otherwise
        number = int(found[0]) if len(found[0]) < 20 else 0
        forms = (number + 1, number - 1, number + 4, f"-{number}", f"{number}.0", f"0{number}")
        new = str(rng.choice(forms)).encode()
    elif how == 6:  # the token of another place
        new = rng.choice(tokens)[0]
    else:
        new = b""
    return text[: found.start()] + new + text[found.end() :]


def structured(target: str, rng: random.Random) -> bytes:
    """An input made at random: of the right form, with values that may be right."""
    if target != "header":
        return _value(rng, 0).encode()
    parts, end = [], 0
    for i in range(rng.randrange(5)):
        shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
        dtype = rng.choice([*DTYPES, "F32", "F32"])
        size = DTYPES[dtype][0]
        for side in shape:
            size *= side
        entry: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
        items = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in entry.items()]
        if rng.random() < 0.15:
            items[rng.randrange(3)] = f"{rng.choice(STRINGS)}:{_value(rng, 2)}"
        if rng.random() < 0.06:
            items.append(rng.choice((rng.choice(items), f"{rng.choice(STRINGS)}:{_value(rng, 1)}")))
        rng.shuffle(items)
        name = f'"t{i}"' if rng.random() < 0.8 else rng.choice(STRINGS)
        parts.append(f"{name}:{{{','.join(items)}}}")
    if rng.random() < 0.2:
        parts.append(f'"__metadata__":{_value(rng, 1)}')
    rng.shuffle(parts)
    text = ("{" + ",".join(parts) + "}" + " " * rng.choice((0, 0, 1, 7))).encode()
    return make.file(text, rng.randbytes(end + (rng.random() < 0.03)))


def _value(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth > 5 or kind < 0.3:
        return rng.choice(NUMBERS)
    if kind < 0.55:
        return rng.choice(STRINGS)
    inner = [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.75:
        return f"[{','.join(inner)}]"
    return "{" + ",".join(f"{rng.choice(STRINGS)}:{value}" for value in inner) + "}"


# -- running --------------------------------------------------------------------------------------


def run(inputs: int, *, seed: int = 0, seconds: float | None = None, most: int = 20) -> Result:
    """Feed `inputs` to the targets in turn, or as many as there is time for, until there are `most`
    findings."""
    rng, started = random.Random(seed), time.perf_counter()
    valid, names = seeds(), list(TARGETS)
    outcomes: Counter[str] = Counter()
    findings: list[Finding] = []
    for name in names:
        for data in valid[name]:
            TARGETS[name](data)  # or nothing would be mutated that was ever accepted
    for i in range(inputs):
        # Every second input is a header, which is where most depends on exactness.
        name = "header" if i % 2 == 0 else names[1 + i // 2 % 3]
        if rng.random() < 0.3:
            data = structured(name, rng)
        else:
            data = mutated(rng.choice(valid[name]), rng, framed=name == "header")
        before = time.perf_counter()
        outcome = attempt(name, data)
        if time.perf_counter() - before > SLOW:
            outcome = f"took {time.perf_counter() - before:.1f} s"
        outcomes[f"{name}: {outcome}" if outcome in KNOWN else f"{name}: finding"] += 1
        if outcome not in KNOWN:
            findings.append(Finding(outcome, name, data))
            if len(findings) == most:
                break
        if seconds is not None and i % 256 == 0 and time.perf_counter() - started > seconds:
            break
    return Result(outcomes, findings, time.perf_counter() - started)


KNOWN = ("accepted", "CorruptError", "RefusedError")


def attempt(target: str, data: bytes) -> str:
    """`accepted`, the name of adaptlib's error, or what was found."""
    try:
        TARGETS[target](data)
    except AdaptlibError as error:
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return "accepted"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    result = run(asked.inputs, seed=asked.seed, seconds=asked.seconds)
    for outcome, count in sorted(result.outcomes.items()):
        print(f"{count:>9,}  {outcome}")
    print(
        f"{sum(result.outcomes.values()):>9,}  inputs in {result.seconds:.0f} s, seed {asked.seed}"
    )
    for finding in result.findings:
        print(f"\n{finding.target}: {finding.what}\n  {finding.data!r}")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
