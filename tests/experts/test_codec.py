"""Experts as bytes: the format is pinned, and what disagrees with itself is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptlib.errors import AdaptlibError, CorruptError, NotFoundError, RefusedError
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.experts.codec import (
    BLOB_NAME,
    MANIFEST_NAME,
    Module,
    Packed,
    assemble,
    check_content,
    check_structure,
    encode_manifest,
    pack,
    parse_manifest,
    read_directory,
    to_raw,
    unpack,
    write_directory,
)
from library_store import Digest
from tests.tiny import lora, make_expert, same_expert, sparse

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_expert(kind: str) -> Expert:
    """Fixed numbers, made without a random generator."""
    numbers = torch.arange(30, dtype=torch.float32) / 8 - 1.5
    if kind == "lora":
        deltas: dict[str, Any] = {
            "layers.0.q": LoRADelta(numbers[:10].reshape(2, 5), numbers[10:16].reshape(3, 2), 0.5),
            "layers.0.v": LoRADelta(
                numbers[16:21].reshape(1, 5).bfloat16(),
                numbers[21:24].reshape(3, 1).bfloat16(),
                16.0,
            ),
        }
    else:
        deltas = {
            "layers.0.q": SparseDelta(torch.tensor([0, 3, 14]), numbers[:3].half(), (3, 5)),
            "layers.0.v": SparseDelta(torch.tensor([1]), torch.eye(16)[None], (16, 32), 16),
        }
    card = {"task": "é", "metrics": {"loss": 0.25, "n": 3}, "parents": ["a", "b"]}
    return Expert("org/base", deltas, card)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_the_bytes_of_an_expert_are_pinned(kind: str) -> None:
    """A change here makes every digest that people have written down another one."""
    packed = pack(golden_expert(kind))
    blob = b"".join(packed.blob())
    manifest = packed.manifest(str(Digest.of(blob))).encode()
    digests = json.loads((GOLDEN / "digests.json").read_bytes())
    assert blob == (GOLDEN / f"{kind}.safetensors").read_bytes()
    assert manifest == (GOLDEN / f"{kind}.json").read_bytes()
    assert digests[kind] == {"blob": str(Digest.of(blob)), "manifest": str(Digest.of(manifest))}
    kept = assemble("golden", parse_manifest("golden", manifest), memoryview(bytearray(blob)))
    assert same_expert(unpack(kept), golden_expert(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pack_and_unpack_keep_every_bit(dtype: torch.dtype) -> None:
    odd = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max, 1 / 3, 5])
    tensor = odd.to(dtype).reshape(1, 5)
    expert = Expert("b", {"m": LoRADelta(tensor, tensor.T.contiguous(), 1 / 3)}, {"n": 1})
    assert same_expert(unpack(pack(expert)), expert)
    entries = SparseDelta(torch.tensor([0, 2, 3, 7, 9]), odd.to(dtype), (2, 5))
    assert same_expert(unpack(pack(Expert("b", {"m": entries}))), Expert("b", {"m": entries}))


def test_a_view_and_a_parameter_are_packed_as_what_they_show() -> None:
    a = torch.nn.Parameter(torch.arange(20.0).reshape(5, 4)[:, :2].T)
    expert = Expert("b", {"m": LoRADelta(a, torch.ones(3, 2))})
    assert torch.equal(unpack(pack(expert)).deltas["m"].a, a.detach())


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_directory_comes_back(kind: str, tmp_path: Path) -> None:
    expert = golden_expert(kind)
    write_directory(pack(expert), tmp_path / "new" / "one")
    assert sorted(p.name for p in (tmp_path / "new/one").iterdir()) == [MANIFEST_NAME, BLOB_NAME]
    assert same_expert(unpack(read_directory(tmp_path / "new" / "one")), expert)
    assert dict(read_directory(tmp_path / "new" / "one").card) == dict(expert.card)


def written(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An adaptlib directory whose manifest was changed by hand."""
    write_directory(pack(golden_expert("lora")), directory)
    document = json.loads((directory / MANIFEST_NAME).read_bytes())
    change(document)
    (directory / MANIFEST_NAME).write_text(json.dumps(document))
    return directory


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (lambda d: d.update(extra=1), "unknown field"),
    "no card": (lambda d: d.pop("card"), "card"),
    "another schema": (lambda d: d.update(schema="adaptlib.expert/2"), "schema|Invalid enum"),
    "another kind": (lambda d: d.update(kind="ia3"), "Invalid enum"),
    "kind of other tensors": (lambda d: d.update(kind="sparse"), "missing|no module"),
    "a field of a module": (lambda d: d["modules"]["layers.0.q"].update(alpha=1), "unknown field"),
    "rank": (lambda d: d["modules"]["layers.0.q"].update(rank=3), "does not go"),
    "no rank": (lambda d: d["modules"]["layers.0.q"].pop("rank"), "does not go"),
    "shape": (lambda d: d["modules"]["layers.0.q"].update(shape=[5, 3]), "does not go"),
    "negative shape": (
        lambda d: d["modules"]["layers.0.q"].update(shape=[-3, 5]),
        "Expected `int` >= 0",
    ),
    "shape of three": (lambda d: d["modules"]["layers.0.q"].update(shape=[3, 5, 1]), "length"),
    "no scale": (lambda d: d["modules"]["layers.0.q"].pop("scale"), "does not go"),
    "scale is text": (lambda d: d["modules"]["layers.0.q"].update(scale="1"), "scale"),
    "a block": (lambda d: d["modules"]["layers.0.q"].update(block=16), "does not go"),
    "a module less": (lambda d: d["modules"].pop("layers.0.q"), "belongs to no module"),
    "a module more": (
        lambda d: d["modules"].update(x={"shape": [3, 5], "rank": 1, "scale": 1.0}),
        "'x.lora_a' is missing",
    ),
    "a tensor less": (lambda d: d["tensors"].pop("layers.0.q.lora_a"), "differ in 1 place"),
    "another dtype": (
        lambda d: d["tensors"]["layers.0.q.lora_a"].update(dtype="I32"),
        "differ in 1 place",
    ),
    "another digest": (lambda d: d["blob"].update(digest="sha256:" + "0" * 64), "digest"),
    "a path as digest": (lambda d: d["blob"].update(digest="../../x"), "digest"),
    "task is a number": (lambda d: d["card"].update(task=5), "task is 5"),
    "base is text": (lambda d: d["card"].update(base="org/base"), "base is 'org/base'"),
    "digest of the base is a list": (lambda d: d["card"].update(base={"digest": []}), "base is"),
    "two bases": (lambda d: d["card"].update(base={"id": "org/other"}), "org/other"),
    "no base": (lambda d: d.update(base=""), "base"),
    "peft is text": (lambda d: d["card"].update(peft="x"), "peft is 'x'"),
    "notes are numbers": (lambda d: d["card"].update(peft={"migrated": [1]}), "peft is"),
}


@pytest.mark.parametrize("case", LIES, ids=lambda case: case.replace(" ", "-"))
def test_a_manifest_that_lies_is_corrupt(case: str, tmp_path: Path) -> None:
    change, words = LIES[case]
    with pytest.raises(CorruptError, match=words) as caught:
        read_directory(written(tmp_path / "lying", change))
    assert "lying" in str(caught.value)


def test_no_module_is_refused(tmp_path: Path) -> None:
    packed = Packed("lora", "b", {}, {})
    with pytest.raises(RefusedError, match="no module"):
        check_structure("x", packed)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (b"", CorruptError, "not an expert's manifest"),
        (b"{", CorruptError, "not an expert's manifest"),
        (b"[" * 100_000, CorruptError, "not an expert's manifest"),
        (b'"\xff"', CorruptError, "not an expert's manifest"),
        (b" " * (17 << 20), RefusedError, "at most"),
    ],
    ids=["empty", "cut", "nested", "not-utf8", "too-long"],
)
def test_a_manifest_that_is_none(
    text: bytes, error: type[AdaptlibError], words: str, tmp_path: Path
) -> None:
    write_directory(pack(golden_expert("lora")), tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(error, match=words) as caught:
        read_directory(tmp_path)
    assert MANIFEST_NAME in str(caught.value)


def test_a_key_twice_in_a_manifest_is_refused(tmp_path: Path) -> None:
    write_directory(pack(golden_expert("lora")), tmp_path)
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'{"base"', b'{"base":"x","base"', 1))
    with pytest.raises(RefusedError, match="'base' twice"):
        read_directory(tmp_path)


def test_files_that_are_missing_or_changed(tmp_path: Path) -> None:
    write_directory(pack(golden_expert("lora")), tmp_path)
    blob = tmp_path / BLOB_NAME
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptError, match="its digest is"):
        read_directory(tmp_path)
    blob.unlink()
    with pytest.raises(NotFoundError, match=BLOB_NAME):
        read_directory(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(NotFoundError, match=MANIFEST_NAME):
        read_directory(tmp_path)


def test_a_part_too_few_or_too_many() -> None:
    packed = pack(golden_expert("lora"))
    fewer = {name: raw for name, raw in packed.tensors.items() if name != "layers.0.v.lora_b"}
    with pytest.raises(CorruptError, match=r"'layers\.0\.v\.lora_b' is missing"):
        check_structure("x", replace(packed, tensors=fewer))
    more = {**packed.tensors, "other": to_raw(torch.ones(1))}
    with pytest.raises(CorruptError, match="'other' belongs to no module"):
        check_structure("x", replace(packed, tensors=more))


@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_anywhere_is_refused(part: str, bad: float) -> None:
    delta = lora(0)
    broken = getattr(delta, part[-1]).clone()
    broken[-1, -1] = bad
    packed = pack(Expert("b", {"m": replace(delta, **{part[-1]: broken})}))
    with pytest.raises(RefusedError, match=f"x: m.{part} holds NaN"):
        check_content("x", packed)
    with pytest.raises(RefusedError, match="the scale of m"):
        check_content("x", pack(Expert("b", {"m": replace(delta, scale=bad)})))


@pytest.mark.parametrize("positions", [[3, 3], [4, 2], [-1, 2], [2, 15]])
def test_positions_of_a_file_rise_within_the_matrix(positions: list[int]) -> None:
    packed = pack(Expert("b", {"m": sparse(0, n=2)}))
    index = to_raw(torch.tensor(positions, dtype=torch.int32))
    lying = replace(packed, tensors={**packed.tensors, "m.index": index})
    check_structure("x", lying)  # the tensors alone look right
    with pytest.raises(CorruptError, match=r"positions of m do not rise within 0\.\.14"):
        check_content("x", lying)


def test_positions_are_as_short_as_they_can_be() -> None:
    small = pack(Expert("b", {"m": sparse(0)})).tensors["m.index"]
    huge = SparseDelta(torch.tensor([0, 2**32]), torch.ones(2), (70_000, 70_000))
    assert small.dtype == "I32"
    assert pack(Expert("b", {"m": huge})).tensors["m.index"].dtype == "I64"


@pytest.mark.parametrize(
    "module",
    [Module((3, 5), block=0), Module((3, 5), block=4), Module((3, 5), rank=1), Module((-3, -5))],
)
def test_a_sparse_module_says_what_it_is(module: Module) -> None:
    packed = pack(Expert("b", {"m": sparse(0)}))
    with pytest.raises(CorruptError, match="does not go with"):
        check_structure("x", replace(packed, modules={"m": module}))


def test_a_dtype_that_no_file_holds_is_refused() -> None:
    with pytest.raises(RefusedError, match="complex64"):
        to_raw(torch.ones(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    "card",
    [
        {"x": float("nan")},
        {"x": {"y": [float("inf")]}},
        {"x": object()},
        {"x": torch.ones(1)},
        {"x": np.float32(1)},
        {"x": "\ud800"},
        {"x": {1: 2}},
    ],
    ids=["nan", "inf", "object", "tensor", "numpy", "surrogate", "number-key"],
)
def test_a_card_that_json_cannot_hold_is_refused(card: dict[str, Any]) -> None:
    packed = pack(make_expert(**card))
    with pytest.raises(RefusedError, match="who: the card"):
        encode_manifest("who", packed.manifest("sha256:" + "0" * 64))


def test_the_manifest_tells_what_an_expert_tells() -> None:
    for expert in (golden_expert("lora"), golden_expert("sparse")):
        manifest = pack(expert).manifest("sha256:" + "0" * 64)
        assert manifest.params == expert.params
        assert manifest.rank == expert.rank
        assert parse_manifest("m", manifest.encode()) == manifest
