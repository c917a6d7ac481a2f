"""A streamed expert is the library's, bit for bit, and nothing of it stays in memory."""

import gc
import weakref
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import jaxtyping
import msgspec
import pytest

from adaptlib.errors import CorruptError
from adaptlib.experts import Expert, Library, LoRADelta, SparseDelta
from adaptlib.experts.streamed import streamed
from adaptlib.merging import MERGES
from library_store import Digest, LocalStore, MemoryStore, ObjectNotFound
from tests import tiny
from tests.tiny import make_expert, same_expert


@pytest.fixture
def filled(library: Library) -> Library:
    library.add(make_expert(0, task="t", licence="CC0"), "lora")
    library.add(make_expert(1, kind="sparse"), "entries")
    blocks = {f"b.{i}": tiny.sparse(i, n=2, d_out=32, d_in=48, block=16) for i in range(2)}
    library.add(Expert("org/base", blocks), "blocks")
    mixed = {"z": tiny.lora(3, rank=1), "a": tiny.lora(4, rank=3), "m": tiny.lora(5, d_out=9)}
    library.add(Expert("org/base", mixed), "mixed")
    return library


class Memory(bytearray):
    """Bytes that can be referred to weakly."""


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """A weak reference to the memory under each view that a store has given since. Checking types
    at run time is off: it looks at what is in a mapping."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given: list[weakref.ref] = []
    mapped, held = LocalStore.view, MemoryStore.view

    def local(self, digest: Digest, *, verify: bool = True) -> memoryview:
        found = mapped(self, digest, verify=verify)
        assert isinstance(found.obj, mmap)
        given.append(weakref.ref(found.obj))
        return found

    def memory(self, digest: Digest, *, verify: bool = True) -> memoryview:
        copy = Memory(held(self, digest, verify=verify))
        given.append(weakref.ref(copy))
        return memoryview(copy)

    monkeypatch.setattr(LocalStore, "view", local)
    monkeypatch.setattr(MemoryStore, "view", memory)
    return given


def alive(views: list[weakref.ref]) -> int:
    gc.collect()
    return sum(view() is not None for view in views)


def test_it_is_the_expert_of_the_library(filled: Library) -> None:
    for name in filled:
        kept, streamed = filled[name], filled.stream(name)
        assert same_expert(streamed, kept)
        assert streamed.card == kept.card
        assert (streamed.kind, streamed.rank, streamed.params) == (
            kept.kind,
            kept.rank,
            kept.params,
        )
        assert streamed.shapes == kept.shapes
        assert list(streamed.shapes) == list(streamed.deltas) == list(kept.deltas)
        assert len(streamed.deltas) == len(kept.deltas)
        assert streamed.fingerprint == kept.fingerprint
        assert repr(streamed) == repr(kept)
        assert "nowhere" not in streamed.deltas
        with pytest.raises(KeyError):
            streamed.deltas["nowhere"]
        assert streamed.deltas.get("nowhere") is None
        again = replace(streamed, card={"other": 1})
        assert again.deltas is streamed.deltas


def test_it_can_be_added_again(filled: Library) -> None:
    assert filled.add(filled.stream("mixed"), "copy").digest == filled.digest("mixed")


def test_nothing_is_read_before_it_is_looked_at(filled: Library, views: list) -> None:
    experts = {name: filled.stream(name) for name in list(filled)}
    assert len(views) == len(experts)  # verified
    assert not alive(views)
    for expert in experts.values():
        _ = (expert.kind, expert.rank, expert.params, expert.shapes, expert.card, repr(expert))
        assert all(module in expert.deltas for module in expert.deltas)
    assert len(views) == len(experts)
    delta = experts["lora"].deltas["layers.0.proj"]
    assert isinstance(delta, LoRADelta)
    assert len(views) == len(experts) + 1
    assert alive(views) == 1
    kept = delta.a
    del delta
    assert alive(views) == 1  # whoever holds a tensor holds what it lies in
    del kept
    assert not alive(views)


def test_a_look_up_maps_and_copies_nothing(local: Library) -> None:
    local.add(make_expert(1, kind="sparse"), "e")
    expert = local.stream("e")
    first, second = (expert.deltas["layers.1.proj"] for _ in range(2))
    assert isinstance(first, SparseDelta)
    assert isinstance(second, SparseDelta)
    first.values.fill_(7.0)  # changes that mapping alone
    assert same_expert(expert, make_expert(1, kind="sparse"))
    assert not bool((second.values == 7.0).any())


def test_a_merge_holds_one_module_of_each(local: Library, views: list) -> None:
    count, modules = 6, 5
    for i in range(count):
        deltas = {f"layers.{m}.proj": tiny.lora(10 * i + m) for m in range(modules)}
        local.add(Expert("org/base", deltas), f"e{i}")
    experts = {name: local.stream(name) for name in local}
    most: list[int] = []
    merged = MERGES["linear"](experts, progress=lambda *_: most.append(alive(views)))
    assert len(most) == modules
    assert max(most) <= count  # those of the module that was just made
    assert not alive(views)
    assert len(views) == count + count * modules  # verified once each, then each module once
    assert same_expert(merged, MERGES["linear"](dict(local)))


def test_corruption_is_found_when_it_is_opened(local: Library) -> None:
    local.add(make_expert(0), "e")
    path = blob_path(local)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    overwrite(path, bytes(damaged))
    with pytest.raises(CorruptError, match=r"corrupt.*used by e"):
        local.stream("e")


def test_a_file_that_changes_or_goes_is_an_error(local: Library) -> None:
    local.add(make_expert(0), "e")
    expert = local.stream("e")
    path = blob_path(local)
    whole = path.read_bytes()
    overwrite(path, whole[:-4])
    with pytest.raises(CorruptError, match=f"{len(whole) - 4} bytes now; it had {len(whole)}"):
        expert.deltas["layers.0.proj"]
    path.unlink()
    with pytest.raises(ObjectNotFound):
        expert.deltas["layers.0.proj"]


def test_a_manifest_of_another_blob_is_refused(local: Library) -> None:
    one = local.add(make_expert(0), "one").manifest
    local.add(Expert("org/base", {"m": tiny.lora(3)}), "two")
    other = local.manifest("two")
    crossed = msgspec.structs.replace(other, blob=one.blob)
    with pytest.raises(CorruptError, match="manifest and tensors differ"):
        streamed("two", crossed, local.store)


def blob_path(library: Library) -> Path:
    assert library.path is not None
    hex_ = Digest.parse(library.manifest("e").blob.digest).hex
    return library.path / "objects" / "sha256" / hex_[:2] / hex_


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)
