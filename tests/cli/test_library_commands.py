"""Commands that keep experts: their JSON is a contract, their stdout is data and nothing else."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from adaptlib.experts import Library
from adaptlib.experts.codec import pack, read_directory, unpack, write_directory
from adaptlib.experts.derived import training_run
from tests.tiny import make_expert, same_expert

ROW = {"name", "digest", "kind", "base", "task", "rank", "modules", "params", "bytes"}


def test_init_makes_a_library_once(run: Any, tmp_path: Path) -> None:
    document = run("init", "--json").document
    assert document == {
        "schema": "adaptlib.init/1",
        "path": str(tmp_path / "library"),
        "experts": 0,
        "new": True,
    }
    assert not run("init", "--json").document["new"]
    assert run("init", "other").out == "New library at other\n"
    assert run("init", "-L", "third", "-q").out == "third\n"
    assert Library.open(tmp_path / "third") == {}


def test_init_here_without_a_word(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTLIB_LIBRARY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("init", "--json").document["path"] == str(tmp_path / ".adaptlib")
    assert run("list", "-q").code == 0  # it is found from here
    assert run("init", "~/mine", "--json").document["path"] == str(tmp_path / "mine")


def test_add_tells_what_it_kept(run: Any, tmp_path: Path) -> None:
    run("init")
    write_directory(pack(make_expert(0)), tmp_path / "one")
    write_directory(pack(make_expert(1, kind="sparse")), tmp_path / "two")
    result = run("add", "one", "two", "--json", "--task", "t")
    assert result.code == 0
    assert result.err == ""
    one, two = result.document["added"]
    assert result.document["schema"] == "adaptlib.add/1"
    assert one.keys() == ROW - {"task"} | {"new", "notes"}
    assert (one["name"], one["kind"], one["rank"], one["new"]) == ("one", "lora", 2, True)
    assert (two["name"], two["kind"], two["rank"], two["modules"]) == ("two", "sparse", None, 2)
    again = run("add", "one", "--task", "t", "--json").document["added"][0]
    assert (again["digest"], again["new"]) == (one["digest"], False)
    words = run("add", "one", "--name", "x:v1", "--description", "d")
    assert words.out.startswith("Added  x:v1  sha256:")
    assert "is not on this machine" in words.err
    assert run("add", "one", "--name", "y", "-q").out == "y\n"
    assert run("show", "x:v1", "--json").document["manifest"]["card"]["description"] == "d"


def test_list(run: Any, library: Library) -> None:
    document = run("list", "--json").document
    assert document["schema"] == "adaptlib.list/1"
    assert all(row.keys() == ROW for row in document["experts"])
    assert [row["name"] for row in document["experts"]] == ["best", "poems", "sums", "team/sql:v1"]
    by_name = {row["name"]: row for row in document["experts"]}
    assert by_name["poems"]["task"] == "poems of the sea"
    assert by_name["poems"]["digest"] == library.digest("poems")
    assert by_name["sums"]["params"] == library["sums"].params
    assert run("ls", "--json").document == document
    assert run("list", "-q").out.split() == list(library)
    table = run("list")
    assert table.out.splitlines()[0].split() == [
        "NAME", "KIND", "RANK", "SIZE", "DIGEST", "BASE"
    ]  # fmt: skip
    assert len(table.out.splitlines()) == 5
    assert table.err.startswith("4 experts, ")


def test_list_of_an_empty_library(run: Any) -> None:
    run("init")
    assert run("list", "--json").document["experts"] == []
    assert run("list").out == ""
    assert "The library is empty" in run("list").err


def test_show(run: Any, library: Library) -> None:
    document = run("show", "best", "--json").document
    assert document.keys() == {"schema", "name", "names", "digest", "manifest"}
    assert document["schema"] == "adaptlib.show/1"
    assert document["names"] == ["best", "poems"]
    assert document["manifest"]["modules"]["layers.0.proj"] == {
        "shape": [3, 5],
        "rank": 2,
        "scale": 0.5,
    }
    assert document["manifest"]["card"]["task"] == "poems of the sea"
    assert run("show", document["digest"][7:15], "--json").document["digest"] == document["digest"]
    assert run("show", "best", "-q").out == document["digest"] + "\n"
    text = run("show", "sums").out
    for word in ("sums", "sparse", "org/base", "not checked yet", "layers.*.proj", "3 x 5"):
        assert word in text


def test_rm_mv_tag_log(run: Any, library: Library) -> None:
    digest = library.digest("poems")
    assert run("mv", "poems", "verses", "--json").document == {
        "schema": "adaptlib.mv/1",
        "old": "poems",
        "new": "verses",
        "digest": digest,
    }
    assert run("tag", "verses", "verses:v1", "--json").document == {
        "schema": "adaptlib.tag/1",
        "name": "verses",
        "new": "verses:v1",
        "digest": digest,
    }
    assert run("tag", "sums", "best").code == 5
    assert run("tag", "sums", "best", "--replace", "-q").code == 0
    removed = run("rm", "verses", "sums", "verses:v1", "sums", "--json").document
    assert removed["schema"] == "adaptlib.rm/1"
    assert [entry["name"] for entry in removed["removed"]] == ["verses", "sums"]
    assert removed["removed"][0]["digest"] == digest
    log = run("log", "verses", "--json").document
    assert log["schema"] == "adaptlib.log/1"
    assert all(e.keys() == {"ref", "when", "old", "new", "reason"} for e in log["entries"])
    assert [(e["ref"], e["new"]) for e in log["entries"]][-1] == ("verses", digest)
    assert log["entries"][0]["new"] is None
    assert run("log", "verses", "-q").out.splitlines()[-1] == digest
    assert "mv from poems" in run("log", "verses").out
    text = run("rm", "best")
    assert text.out.startswith("Removed  best  sha256:")
    undo, frees = text.err.splitlines()
    assert "gc frees 0" not in frees
    assert "after 14 days" in frees
    assert run(*undo.removeprefix("  Undo: adaptlib ").split()).code == 0
    assert "best" in library


def test_rm_says_what_gc_would_free_and_gc_frees_it(run: Any, library: Library) -> None:
    dry = run("rm", "poems", "best", "sums", "--dry-run", "--json").document
    assert dry["dry_run"]
    assert "poems" in library
    assert "gc frees nothing of it: other names" in run("rm", "poems", "--dry-run").err
    done = run("rm", "poems", "best", "sums", "--json").document
    assert done == {**dry, "dry_run": False}
    assert run("gc", "--grace", "0", "--json").document["bytes"] == 0  # the history keeps it
    assert run("gc", "--grace", "0", "--history", "13d", "--json").document["bytes"] == 0
    freed = run("gc", "--grace", "0", "--history", "0", "--json").document
    assert freed["bytes"] == done["frees"] > 0


def test_pin_and_unpin(run: Any, library: Library) -> None:
    digest = library.digest("sums")
    assert run("pin").err.startswith("Nothing is pinned.")
    assert run("pin", "sums").out == f"Pinned  sums  {digest[:19]}  as {digest[7:19]}\n"
    assert run("pin", "sums").out.startswith("Already pinned")
    assert run("pin", "poems", "--label", "paper", "-q").out == "paper\n"
    assert run("pin", "sums", "--label", "paper").code == 5
    assert run("pin", "-q").out.split() == [digest[7:19], "paper"]
    assert run("pin", "--label", "x").code == 2
    listed = run("pin", "--json").document["pins"]
    assert [entry["label"] for entry in listed] == [digest[7:19], "paper"]
    assert "paper" in run("pin").out
    run("rm", "sums")
    run("gc", "--grace", "0", "--history", "0")
    assert run("show", digest).code == 0
    assert run("unpin", digest[7:19]).out == f"Unpinned  {digest[7:19]}  {digest[:19]}\n"
    run("gc", "--grace", "0", "--history", "0")
    assert run("show", digest).code == 3
    assert run("unpin", "nobody").code == 3


def test_rm_removes_all_or_nothing(run: Any, library: Library) -> None:
    before = library.tags()
    assert run("rm", "poems", "absent").code == 3
    assert run("rm", "poems", library.digest("sums")).code == 2
    assert run("rm", "poems", "../x").code in (2, 3)
    assert library.tags() == before


def test_diff(run: Any, library: Library) -> None:
    document = run("diff", "poems", "sums", "--json").document
    assert document.keys() == {
        "schema", "a", "b", "same", "cosine", "fields", "card", "modules"
    }  # fmt: skip
    assert document["schema"] == "adaptlib.diff/1"
    a, b = library["poems"].deltas["layers.0.proj"], library["sums"].deltas["layers.0.proj"]
    cosine = (a.dense() * b.dense()).sum() / a.dense().norm() / b.dense().norm()
    assert document["modules"][0]["cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    assert document["fields"]["kind"] == ["lora", "sparse"]
    assert not document["same"]
    same = run("diff", "poems", "best", "--json").document
    assert (same["same"], same["cosine"], same["modules"]) == (True, 1.0, [])
    assert "are one expert" in run("diff", "poems", "best").out
    assert "cosine of all updates" in run("diff", "poems", "sums").out


@pytest.mark.parametrize("layout", ["adaptlib", "peft"])
def test_export_and_add_come_back(run: Any, library: Library, tmp_path: Path, layout: str) -> None:
    document = run("export", "poems", "out", "--format", layout, "--json").document
    assert document == {
        "schema": "adaptlib.export/1",
        "name": "poems",
        "path": str(tmp_path / "out"),
        "format": layout,
        "notes": [],
    }
    assert run("add", "out", "--name", "back").code == 0
    for name, delta in library["poems"].deltas.items():
        assert (delta.dense() == library["back"].deltas[name].dense()).all()
    if layout == "adaptlib":
        assert same_expert(unpack(read_directory(tmp_path / "out")), library["poems"])
    before = sorted(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert run("export", "poems", "out").code == 5
    assert sorted(path.read_bytes() for path in (tmp_path / "out").iterdir()) == before


def test_gc_deletes_training_runs_that_nobody_goes_on_with(run: Any, library: Library) -> None:
    assert library.path is not None
    old, new = (training_run(library.path, key) for key in ("aa", "bb"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "cpu-1.safetensors").write_bytes(b"12345")
    week = time.time() - 8 * 86400
    for path in (old / "cpu-1.safetensors", old):
        os.utime(path, (week, week))
    assert "Would remove  1 unfinished training run, 5 B" in run("gc", "--dry-run").out
    assert old.exists()
    assert run("gc", "--json").document["training_runs"] == 1
    assert not old.exists()
    assert new.exists()


def test_verify_gc_and_doctor(run: Any, library: Library) -> None:
    ok = run("verify", "--json")
    assert (ok.code, ok.document) == (
        0,
        {
            "schema": "adaptlib.verify/1",
            "checked": 6,
            "problems": [],
            "quarantined": [],
            "repaired": [],
            "mended": [],
        },
    )
    assert run("verify", "--deep").out == "6 objects checked, 0 problems\n"
    assert run("doctor").code == 0
    doctor = run("doctor", "--json").document
    assert doctor["schema"] == "adaptlib.doctor/1"
    assert {check["status"] for check in doctor["checks"]} <= {"ok", "warn"}
    run("rm", "sums")
    assert run("gc", "--json").document["removed"] == []
    dry = run("gc", "--grace", "0", "--history", "0", "--dry-run", "--json").document
    done = run("gc", "--grace", "0", "--history", "0", "--json").document
    assert dry["schema"] == done["schema"] == "adaptlib.gc/1"
    assert dry["removed"] == done["removed"]
    assert len(done["removed"]) == 2
    assert done["bytes"] == dry["bytes"] > 0
    assert run("gc", "--restore", done["id"], "--json").document["restored"] == 2


def test_verify_finds_a_flipped_byte(run: Any, library: Library, tmp_path: Path) -> None:
    digest = library.manifest("poems").blob.digest
    path = tmp_path / "library" / "objects" / "sha256" / digest[7:9] / digest[7:]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run("verify", "--json")
    assert result.code == 4
    (problem,) = result.document["problems"]
    assert problem.keys() == {"kind", "digest", "experts", "detail", "hint"}
    assert (problem["kind"], problem["digest"]) == ("corrupt", digest)
    assert problem["experts"] == ["best", "poems"]
    assert run("verify", "--deep").code == 4
    assert "used by: best, poems" in run("verify").out
    for command in (["export", "poems", "out"], ["diff", "poems", "sums"]):
        result = run(*command, "--json")
        assert (result.code, result.error["code"]) == (4, 4)
    assert run("list", "--json").code == 0
    assert run("show", "poems").code == 0


def test_a_thousand_experts_list_the_same_with_and_without_index(run: Any, tmp_path: Path) -> None:
    library = Library.open(tmp_path / "library", create=True)
    store = library.store
    packed = pack(make_expert())
    blob = str(store.put(packed.blob()))
    manifest = packed.manifest(blob)
    refs = tmp_path / "library" / "refs"
    for i in range(1000):  # as a copied library has them, without the cost of a thousand fsyncs
        data = json.loads(manifest.encode()) | {"card": {"task": f"t{i}"}}
        text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
        digest = _fast_put(tmp_path / "library", text)
        (refs / f"e{i:04}").mkdir(parents=True)
        (refs / f"e{i:04}" / "latest").write_text(f"{digest}\n")
    fresh = run("list", "--json")
    assert len(fresh.document["experts"]) == 1000
    assert (tmp_path / "library" / "index.db").is_file()
    assert run("list", "--json").out == fresh.out
    (tmp_path / "library" / "index.db").write_bytes(b"no database")
    assert run("list", "--json").out == fresh.out


def _fast_put(root: Path, data: bytes) -> str:
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    path = root / "objects" / "sha256" / digest[:2] / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"sha256:{digest}"
