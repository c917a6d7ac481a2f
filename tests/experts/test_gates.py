"""Gates: a vector of a module beside its update, kept with the expert and no part of the update."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import AdaptlibError, CorruptError, RefusedError, UsageError
from adaptlib.experts import Expert, Library
from adaptlib.experts.arithmetic import interpolate, negate
from adaptlib.experts.codec import (
    Packed,
    assemble,
    check_content,
    check_structure,
    pack,
    parse_manifest,
    to_raw,
    unpack,
)
from adaptlib.experts.peft import read_peft_packed, write_peft
from adaptlib.experts.shelf import Shelf
from adaptlib.experts.sketches import sketch_expert, sketches
from library_store import Digest
from tests.experts.test_codec import GOLDEN, golden_expert
from tests.tiny import make_expert, same_expert, same_tensor


def gated(kind: str = "lora", seed: int = 0) -> Expert:
    expert = make_expert(seed, kind=kind)
    generator = torch.Generator().manual_seed(seed)
    return replace(
        expert, gates={m: torch.randn(5, generator=generator) for m in reversed([*expert.deltas])}
    )


def golden() -> Expert:
    gate = torch.arange(5, dtype=torch.float32) / 8 - 0.25
    return replace(golden_expert("lora"), gates={"layers.0.v": gate})


def same_gates(a: Expert, b: Expert) -> bool:
    return list(a.gates) == list(b.gates) and all(
        same_tensor(a.gates[module], b.gates[module]) for module in a.gates
    )


def test_the_bytes_of_a_gated_expert_are_pinned() -> None:
    packed = pack(golden())
    blob = b"".join(packed.blob())
    manifest = packed.manifest(str(Digest.of(blob))).encode()
    digests = json.loads((GOLDEN / "digests.json").read_bytes())
    assert blob == (GOLDEN / "gated.safetensors").read_bytes()
    assert manifest == (GOLDEN / "gated.json").read_bytes()
    assert digests["gated"] == {"blob": str(Digest.of(blob)), "manifest": str(Digest.of(manifest))}
    kept = unpack(assemble("g", parse_manifest("g", manifest), memoryview(bytearray(blob))))
    assert same_expert(kept, golden())
    assert same_gates(kept, golden())
    assert parse_manifest("g", manifest).gates == 1
    assert parse_manifest("g", (GOLDEN / "lora.json").read_bytes()).gates == 0


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_it_is_another_expert_with_the_same_update(kind: str, library: Library) -> None:
    bare, with_gates = make_expert(kind=kind), gated(kind)
    assert list(with_gates.gates) == list(with_gates.deltas)  # sorted, as deltas are
    one, two = library.add(bare, "bare"), library.add(with_gates, "gated")
    assert one.digest != two.digest
    assert same_gates(library["gated"], with_gates)
    assert library["bare"].gates == {}
    assert library["gated"].fingerprint == bare.fingerprint
    assert two.manifest.params == one.manifest.params == with_gates.params == bare.params
    assert (sketch_expert(library.packed("gated")) == sketch_expert(library.packed("bare"))).all()
    rows = sketches(library).rows
    assert (rows[0] == rows[1]).all()
    streamed = library.stream("gated")
    assert same_expert(streamed, bare)
    assert (streamed.gates, streamed.params) == ({}, bare.params)
    assert same_gates(Shelf(library, budget=1 << 20)["gated"], with_gates)
    if kind == "lora":  # positions are looked at, which a device without memory cannot
        moved = Shelf(library, budget=1 << 20, device="meta")["gated"]
        assert {gate.device.type for gate in moved.gates.values()} == {"meta"}


def test_arithmetic_leaves_gates_out() -> None:
    assert negate(gated()).gates == {}
    assert interpolate(gated(), gated(seed=1)).gates == {}


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_peft_has_no_place_for_gates(kind: str, tmp_path: Path) -> None:
    wide = make_expert(kind=kind)
    if kind == "sparse":  # SHiRA holds no less than one entry a row and column
        wide = replace(wide, deltas={m: replace(d, shape=(30, 50)) for m, d in wide.deltas.items()})
    width = next(iter(wide.deltas.values())).shape[1]
    with_gates = replace(wide, gates={"layers.1.proj": torch.ones(width)})
    notes = write_peft(with_gates, tmp_path / "gated")
    assert notes == [*write_peft(wide, tmp_path / "bare"), "1 gates are left out: PEFT has no "
                     "place for them"]  # fmt: skip
    there = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in
             ("gated", "bare")]  # fmt: skip
    assert there[0] == there[1]
    assert not any(name.endswith("gate") for name in read_peft_packed(tmp_path / "gated").tensors)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({"nowhere": torch.ones(5)}, "the expert adapts; got 'nowhere'"),
        ({"layers.0.proj": torch.ones(3)}, r"wants \(5,\) float32; got \(3,\) float32"),
        ({"layers.0.proj": torch.ones(5).half()}, "got .* float16"),
    ],
)
def test_a_gate_that_does_not_fit_the_expert(gates: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(make_expert(), gates=gates)


def changed(**tensors: Any) -> Packed:
    """A gated expert with other tensors of its first module."""
    packed = pack(gated())
    named = {f"layers.0.proj.{part}": to_raw(value) for part, value in tensors.items()}
    return replace(packed, tensors={**packed.tensors, **named})


HOSTILE: dict[str, tuple[Callable[[], Packed], type[AdaptlibError], str]] = {
    "too long": (lambda: changed(gate=torch.ones(6)), CorruptError, r"gate of .* F32 \(6,\)"),
    "a matrix": (lambda: changed(gate=torch.ones(1, 5)), CorruptError, r"F32 \(1, 5\)"),
    "no axis": (lambda: changed(gate=torch.tensor(1.0)), CorruptError, r"F32 \(\)"),
    "empty": (lambda: changed(gate=torch.ones(0)), CorruptError, r"F32 \(0,\)"),
    "halves": (lambda: changed(gate=torch.ones(5).half()), CorruptError, "F16"),
    "whole numbers": (lambda: changed(gate=torch.ones(5).int()), CorruptError, "I32"),
    "of no module": (
        lambda: replace(
            pack(gated()), tensors={**pack(gated()).tensors, "x.gate": to_raw(torch.ones(5))}
        ),
        CorruptError,
        "'x.gate' belongs to no module",
    ),
    "another part": (lambda: changed(gates=torch.ones(5)), CorruptError, "belongs to no module"),
    "nan": (lambda: changed(gate=torch.full((5,), torch.nan)), RefusedError, "gate holds NaN"),
    "infinity": (lambda: changed(gate=torch.full((5,), torch.inf)), RefusedError, "gate holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_a_hostile_gate_is_refused(case: str, local: Library) -> None:
    make, error, words = HOSTILE[case]

    def check() -> None:
        check_structure("x", make())
        check_content("x", make())

    with pytest.raises(error, match=words):
        check()
    with pytest.raises(error, match=words):
        local.add(make(), "hostile")
    assert len(local) == 0
