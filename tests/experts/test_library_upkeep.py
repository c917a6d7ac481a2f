"""A library over time: its index, its records, what it throws away and what it finds broken."""

import shutil
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import (
    NotFoundError,
    UsageError,
)
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.codec import pack
from adaptlib.experts.records import load_record, save_record
from library_store import LocalStore, Ref
from tests.tiny import lora, make_expert, same_expert, state

NAN = torch.full((2, 5), float("nan"))


def test_summaries_need_no_index_and_believe_no_broken_one(local: Library) -> None:
    for i in range(4):
        local.add(make_expert(i, kind=("lora", "sparse")[i % 2], task=f"t{i}"), f"e{i}")
    index = local.path / "index.db"  # type: ignore[operator]
    wanted = local.summaries()
    assert wanted["e1"][1].kind == "sparse"
    assert (wanted["e2"][1].task, wanted["e2"][1].rank, wanted["e2"][1].modules) == ("t2", 2, 2)
    manifest = local.manifest("e2")
    assert (wanted["e2"][1].params, wanted["e2"][1].bytes) == (manifest.params, manifest.blob.size)
    assert wanted["e2"][0] == local.digest("e2")

    def other_schema() -> None:
        index.unlink()
        with sqlite3.connect(index) as database:
            database.execute("CREATE TABLE summary (digest TEXT, summary TEXT)")
            database.execute("INSERT INTO summary VALUES (?, 5)", [local.digest("e0")])
            database.execute("PRAGMA user_version = 1")
        database.close()

    def directory() -> None:
        index.unlink()
        index.mkdir()

    damages: list[Callable[[], Any]] = [
        index.unlink,
        lambda: index.write_bytes(b""),
        lambda: index.write_bytes(b"garbage" * 1000),
        lambda: index.write_bytes(index.read_bytes()[:2000]),
        other_schema,
        directory,
    ]
    for damage in damages:
        damage()
        assert local.summaries() == wanted
        if index.is_file():
            assert local.summaries() == wanted
    shutil.rmtree(index)
    assert local.summaries() == wanted
    assert index.is_file()


def test_what_is_derived_can_go(local: Library, tmp_path: Path, save_llama: Any) -> None:
    save_llama(tmp_path / "model")
    deltas = {"model.layers.0.self_attn.q_proj": lora(0, d_out=16, d_in=16)}
    for i in range(2):
        local.add(Expert(str(tmp_path / "model"), deltas, {"i": i}), f"e{i}")
    before, summaries = state(local), local.summaries()
    root = local.path
    assert root is not None
    assert (root / "derived").is_dir()
    shutil.rmtree(root / "derived")
    (root / "index.db").unlink()
    again = Library.open(root)
    assert again.summaries() == summaries
    assert not again.add(Expert(str(tmp_path / "model"), deltas, {"i": 0}), "e0").new
    assert state(again) == before


def test_records_are_kept_with_their_experts(library: Library) -> None:
    digest = library.add(make_expert(), "one").digest
    document = {
        "schema": "adaptlib.clustering/1",
        "k": 2,
        "experts": {"one": digest},
        "clusters": {"0": ["one"]},
    }
    save_record(library.store, "clusterings", "mine", document)
    save_record(library.store, "clusterings", "mine", document)
    assert load_record(library.store, "clusterings", "mine") == document
    assert list(library) == ["one"]  # a record is no expert
    assert "clusterings/mine" not in library
    library.remove("one")
    assert library.gc(grace=timedelta(0), history=timedelta(0)).removed == ()
    assert library.verify(deep=True).ok
    assert library.digest(digest) == digest
    with pytest.raises(NotFoundError, match="no clusterings named 'other'; there are: mine"):
        load_record(library.store, "clusterings", "other")
    with pytest.raises(UsageError, match="no kind of record"):
        save_record(library.store, "experts", "x", {})


def test_gc_removes_what_no_name_leads_to(library: Library) -> None:
    library.add(make_expert(0), "stays")
    gone = library.add(make_expert(1), "goes").digest
    before = state(library)["objects"]
    library.remove("goes")
    assert library.gc().removed == ()  # within the grace period
    assert len(library.gc(grace=timedelta(0), history=timedelta(0), dry_run=True).removed) == 2
    assert state(library)["objects"] == before
    result = library.gc(grace=timedelta(0), history=timedelta(0))
    assert len(result.removed) == 2
    assert gone not in library
    assert library.verify(deep=True).ok
    assert result.id is not None
    assert library.restore(result.id) == 2
    assert state(library)["objects"] == before
    with pytest.raises(NotFoundError, match="no trash"):
        library.restore("../objects")


def flip(library: Library, digest: str) -> None:
    path = library.path / "objects" / "sha256" / digest[7:9] / digest[7:]  # type: ignore[operator]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_verify_names_the_experts_that_a_flipped_byte_spoils(
    local: Library, deep: bool, what: str
) -> None:
    local.add(make_expert(0), "intact")
    digest = local.add(make_expert(1), "spoiled").digest
    local.tag("spoiled", "again")
    assert local.verify(deep=deep).ok
    flip(local, local.manifest("spoiled").blob.digest if what == "blob" else digest)
    report = local.verify(deep=deep)
    assert [p.kind for p in report.problems] == ["corrupt"]
    assert [str(ref) for ref in report.problems[0].refs] == ["again", "spoiled"]
    assert same_expert(local["intact"], make_expert(0))
    with pytest.raises(Exception, match=r"(?i)corrupt|does not hash|digest"):
        local["spoiled"]


def test_deep_verify_reads_what_others_put_there(library: Library) -> None:
    """A store may be written by another program, or an older adaptlib."""
    library.add(make_expert(), "good")
    packed = pack(Expert("b", {"m": LoRADelta(NAN, torch.ones(3, 2))}))
    blob = library.store.put(packed.blob())
    manifest = library.store.put(packed.manifest(str(blob)).encode())
    library.store.move(Ref("bad"), manifest, expect=None)
    assert library.verify().ok
    report = library.verify(deep=True)
    assert [str(ref) for problem in report.problems for ref in problem.refs] == ["bad"]
    assert "NaN" in report.problems[0].detail


def test_looking_experts_up_does_not_read_every_ref_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scan for each lookup, a thousand experts were a million files and 100 seconds."""
    library = Library.open(tmp_path / "library", create=True)
    for i in range(20):
        library.add(make_expert(i), f"e{i}")
    scans = []
    scan = LocalStore.listing
    monkeypatch.setattr(
        LocalStore, "listing", lambda self, seen: scans.append(1) or scan(self, seen)
    )
    assert len([library[name] for name in library]) == 20
    assert len(scans) == 1
    library.add(make_expert(21), "new")
    library.tag("new", "new:v1")
    assert len(scans) == 1
