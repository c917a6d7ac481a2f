"""verify says what is wrong and what to type; what it prints is typed here, and works."""

import json
import random
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adaptlib.experts import Library
from adaptlib.experts.codec import pack, write_directory
from adaptlib.experts.records import save_record
from library_store import Ref
from tests.store.damages import ALL, object_path
from tests.tiny import make_expert, same_expert

REPAIR = "adaptlib verify --repair"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where the expert `poems` was added from."""
    write_directory(pack(make_expert(0, task="poems of the sea")), tmp_path / "source")
    return tmp_path / "source"


def typed(run: Any, command: str, source: Path | None = None) -> Any:
    """Type a command as it was printed; where it leaves a choice, the first, with SOURCE named."""
    words = shlex.split(command.split(", or ")[0])
    assert words[0] == "adaptlib"
    return run(*[str(source) if word == "SOURCE" else word for word in words[1:]])


def hurt(library: Library, what: str, name: str = "poems", kind: str = "flip") -> str:
    digest = library.digest(name) if what == "manifest" else library.manifest(name).blob.digest
    assert library.path is not None
    ALL[kind](object_path(library.path, digest), random.Random(0))
    return digest


@pytest.mark.parametrize("kind", ["flip", "delete", "directory", "fifo"])
@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_what_is_printed_brings_an_expert_back(
    run: Any, library: Library, source: Path, what: str, kind: str
) -> None:
    digest = hurt(library, what, kind=kind)
    (problem,) = (first := run("verify", "--json")).document["problems"]
    assert first.code == 4
    assert problem["kind"] == ("missing" if kind == "delete" else "corrupt")
    assert (problem["digest"], problem["experts"]) == (digest, ["best", "poems"])
    if kind != "delete":
        assert problem["hint"] == REPAIR
        done = typed(run, problem["hint"] + " --json")
        assert done.code == 4
        assert done.document["quarantined"] == [digest]
        assert done.document["repaired"] == []
        (problem,) = done.document["problems"]
    assert problem["kind"] == "missing"
    assert problem["hint"].startswith("adaptlib add SOURCE --name best --replace")
    assert problem["hint"].endswith(", or adaptlib rm best poems")
    assert typed(run, problem["hint"], source).code == 0
    assert run("verify", "--json").document["problems"] == []
    for name in ("poems", "best"):
        assert same_expert(Library.open()[name], make_expert(0, task="poems of the sea"))
    assert run("verify", "--deep").code == 0


@pytest.mark.parametrize("replace", [True, False])
def test_adding_again_heals_without_a_word_on_replacing(
    run: Any, library: Library, source: Path, replace: bool
) -> None:
    for what in ("manifest", "blob"):
        hurt(library, what)
        more = ["--replace"] if replace else []
        result = run("add", source, "--name", "poems", *more)
        assert (result.code, result.out.split()[0]) == (0, "Already"), result.err
        assert run("verify").code == 0


def test_a_damaged_name_is_taken_by_no_other_expert(
    run: Any, library: Library, tmp_path: Path
) -> None:
    hurt(library, "manifest")
    write_directory(pack(make_expert(77)), tmp_path / "other")
    refused = run("add", "other", "--name", "poems", "--json")
    assert refused.code == 5
    assert "--replace" in refused.error["hint"]
    assert run("add", "other", "--name", "poems", "--replace").code == 0
    assert same_expert(Library.open()["poems"], make_expert(77))


@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_the_other_choice_forgets_what_is_lost_and_nothing_else(
    run: Any, library: Library, what: str
) -> None:
    library.tag("sums", "poems:v2")
    hurt(library, what)
    run("verify", "--repair")
    (problem,) = run("verify", "--json").document["problems"]
    other = problem["hint"].split(", or ")[1]
    assert other == "adaptlib rm best poems:latest"  # `rm poems` would remove poems:v2, too
    assert typed(run, other).code == 0
    assert run("verify").code == 0
    assert sorted(Library.open().tags()) == ["poems:v2", "sums", "team/sql:v1"]


def test_an_intact_copy_in_the_trash_is_put_back(run: Any, library: Library, source: Path) -> None:
    run("rm", "poems", "best")
    gone = run("gc", "--grace", "0", "--history", "0", "--json").document
    assert len(gone["removed"]) == 2
    run("add", source, "--name", "poems")
    digests = {hurt(library, "blob"), hurt(library, "manifest", kind="delete")}
    assert {p["hint"] for p in run("verify", "--json").document["problems"]} == {REPAIR}
    done = run("verify", "--repair", "--json")
    assert done.code == 0
    assert set(done.document["repaired"]) == digests
    assert done.document["problems"] == []
    assert same_expert(library["poems"], make_expert(0, task="poems of the sea"))
    text = run("verify", "--repair")
    assert (text.code, text.out) == (0, "6 objects checked, 0 problems left\n")


def test_an_expert_of_the_hub_comes_back_from_there(run: Any, library: Library) -> None:
    source = {"hub": "org/repo", "revision": "a" * 40, "subfolder": "sub dir"}
    card = {"source": source, "task": "it's text"}
    library.add(make_expert(5, **card), "fetched")
    hurt(library, "blob", "fetched", "delete")
    (problem,) = run("verify", "--json").document["problems"]
    assert shlex.split(problem["hint"]) == [
        *("adaptlib", "add", f"hf://org/repo@{'a' * 40}/sub dir"),
        *("--name", "fetched", "--replace", "--task", "it's text"),
    ]


def test_a_bundled_expert_comes_back_from_the_bundle(run: Any, tmp_path: Path) -> None:
    from adaptlib.demo import expert_directories

    library = Library.open(tmp_path / "library", create=True)
    directory = expert_directories()[0]
    library.add(directory)
    for what in ("blob", "manifest"):
        hurt(library, what, directory.name, "delete")
        (problem,) = run("verify", "--json").document["problems"]
        assert problem["hint"] == f"adaptlib init {tmp_path / 'library'} --demo"
        assert typed(run, problem["hint"]).code == 0
        assert run("verify").code == 0


def test_commands_are_about_the_library_that_was_asked_about(
    run: Any, library: Library, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "a b"
    (tmp_path / "library").rename(where)
    opened = Library.open(where)
    hurt(opened, "blob")
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "elsewhere"))
    (problem,) = run("verify", "-L", where, "--json").document["problems"]
    assert problem["hint"] == f"adaptlib verify -L '{where}' --repair"
    done = typed(run, problem["hint"] + " --json")
    assert done.code == 4
    assert typed(run, done.document["problems"][0]["hint"], source).code == 0
    assert run("verify", "-L", where).code == 0


def test_an_error_names_who_needs_what_is_damaged(run: Any, library: Library) -> None:
    digest = hurt(library, "blob")
    for command in (["export", "poems", "out"], ["diff", "best", "sums"]):
        result = run(*command)
        assert result.code == 4
        first, *rest = result.err.splitlines()
        assert first.startswith(f"Error: object {digest} ")
        assert first.endswith(
            "is corrupt: its 448 bytes hash to something else; used by best, poems"
        )
        assert rest == [f"  Next: {REPAIR}"]
    hurt(library, "manifest", kind="delete")
    result = run("show", "poems", "--json")
    assert (result.code, result.error["hint"]) == (4, REPAIR)
    assert "used by best, poems" in result.error["message"]
    assert run("show", "sums").code == 0
    assert run("export", "sums", "sums-out").code == 0


def test_a_pin_that_is_lost_with_its_log_can_be_made_again(
    run: Any, library: Library, tmp_path: Path
) -> None:
    library.pin("sums", "kept")
    (tmp_path / "library" / "refs" / "pins" / "kept" / "latest").write_text("nonsense")
    (tmp_path / "library" / "log" / "pins" / "kept.jsonl").unlink()
    done = run("verify", "--repair", "--json")
    assert done.code == 4
    (problem,) = done.document["problems"]
    assert problem["hint"] == "adaptlib pin NAME --label kept"
    assert typed(run, problem["hint"].replace("NAME", "sums")).code == 0
    assert library.pins() == {"kept": library.digest("sums")}


def test_a_ref_that_cannot_be_read_comes_back(run: Any, library: Library, tmp_path: Path) -> None:
    tags = library.tags()
    (tmp_path / "library" / "refs" / "poems" / "latest").write_text("nonsense")
    failed = run("list", "--json")
    assert (failed.code, failed.error["hint"]) == (4, REPAIR)
    done = typed(run, failed.error["hint"])
    assert done.code == 0
    assert "Mended  refs/poems/latest is back at " in done.out
    assert Library.open().tags() == tags
    assert run("list").code == 0


def test_a_ref_that_no_log_knows_is_said_once(run: Any, library: Library, source: Path) -> None:
    assert library.path is not None
    (library.path / "refs" / "poems" / "latest").write_text("nonsense")
    (library.path / "log" / "poems.jsonl").unlink()
    done = run("verify", "--repair", "--json")
    assert done.code == 4
    (problem,) = done.document["problems"]
    assert (problem["experts"], problem["hint"]) == (["poems"], "adaptlib add SOURCE --name poems")
    assert typed(run, problem["hint"], source).code == 0
    assert run("verify").code == 0


def test_a_damaged_log_is_mended(run: Any, library: Library) -> None:
    assert library.path is not None
    with (library.path / "log" / "poems.jsonl").open("ab") as file:
        file.write(b"nonsense\n")
    failed = run("log", "poems", "--json")
    assert (failed.code, failed.error["hint"]) == (4, REPAIR)
    (problem,) = run("verify", "--json").document["problems"]
    assert problem["hint"] == REPAIR
    done = typed(run, problem["hint"] + " --json")
    assert done.code == 0
    assert "kept 1 of 2 lines" in done.document["mended"][0]
    assert run("log", "poems").code == 0


def test_a_foreign_file_is_moved_out_by_what_is_printed(
    run: Any, library: Library, tmp_path: Path
) -> None:
    assert library.path is not None
    (library.path / "objects" / "sha256" / "it's odd").write_text("x")
    (library.path / "refs" / "Upper").write_text("x")
    problems = run("verify", "--json").document["problems"]
    assert [problem["kind"] for problem in problems] == ["foreign", "foreign"]
    home = tmp_path / "home"
    home.mkdir()
    for problem in problems:
        subprocess.run(problem["hint"], shell=True, check=True, env={"HOME": str(home)})
    assert sorted(path.name for path in home.iterdir()) == ["Upper", "it's odd"]
    assert run("verify").code == 0


def test_records_and_pins_are_forgotten_by_what_is_printed(run: Any, library: Library) -> None:
    library.pin("sums", "kept")
    members = {"sums": library.digest("sums")}
    record = {
        "schema": "adaptlib.clustering/1",
        "method": "mbc",
        "k": 1,
        "features": "factors",
        "clusters": {"0": ["sums"]},
    }
    save_record(library.store, "clusterings", "mine", record | {"experts": members})
    lost = save_record(
        library.store, "routers", "lost", {"router": "x", "options": {}, "experts": {}}
    )
    assert library.path is not None
    object_path(library.path, lost).unlink()
    (problem,) = run("verify", "--json").document["problems"]
    assert problem["hint"] == "adaptlib rm routers/lost"
    assert typed(run, problem["hint"]).code == 0
    assert run("verify").code == 0
    run("rm", "sums")
    object_path(library.path, members["sums"]).unlink()
    (problem,) = run("verify", "--json").document["problems"]
    assert problem["experts"] == ["clusterings/mine", "pins/kept"]
    assert problem["hint"] == "adaptlib rm clusterings/mine && adaptlib unpin kept"
    for command in problem["hint"].split(" && "):
        assert typed(run, command).code == 0
    assert run("verify").code == 0


def test_what_cannot_be_understood_can_be_forgotten(run: Any, library: Library) -> None:
    """Bytes that are what their name says, and no expert: another program put them there."""
    digest = library.store.put(b'{"schema":"adaptlib.expert/1","blob":5}')
    library.store.move(Ref("odd"), digest, expect=None)
    (problem,) = run("verify", "--json").document["problems"]
    assert (problem["kind"], problem["experts"]) == ("unreadable", ["odd"])
    assert problem["hint"] == "adaptlib rm odd"
    assert run("verify", "--repair").code == 4
    assert typed(run, problem["hint"]).code == 0
    assert run("verify", "--deep").code == 0


def test_deep_says_which_name_to_remove(run: Any, library: Library) -> None:
    import torch

    from adaptlib.experts import Expert, LoRADelta

    packed = pack(Expert("b", {"m": LoRADelta(torch.full((2, 5), float("nan")), torch.ones(3, 2))}))
    manifest = packed.manifest(str(library.store.put(packed.blob())))
    library.store.move(Ref("sums", "bad"), library.store.put(manifest.encode()), expect=None)
    assert run("verify").code == 0
    (problem,) = run("verify", "--deep", "--json").document["problems"]
    assert "NaN" in problem["detail"]
    assert run("verify", "--repair", "--deep").code == 4
    assert typed(run, problem["hint"]).code == 0
    assert run("verify", "--deep").code == 0
    assert "sums" in Library.open()


def test_quick_reads_no_weights(run: Any, library: Library) -> None:
    assert run("verify", "--quick").out == "6 objects checked, 0 problems\n"
    hurt(library, "blob", "sums", "flip")
    assert run("verify", "--quick").code == 0
    assert run("verify").code == 4
    hurt(library, "blob", "poems", "extend")
    (problem,) = run("verify", "--quick", "--json").document["problems"]
    assert (problem["kind"], problem["experts"], problem["hint"]) == (
        "corrupt",
        ["best", "poems"],
        REPAIR,
    )
    for other in ("--deep", "--repair"):
        assert run("verify", "--quick", other).code == 2


def test_without_repair_nothing_is_changed(run: Any, library: Library) -> None:
    assert library.path is not None
    hurt(library, "blob")
    (library.path / "refs" / "sums" / "latest").write_text("nonsense")
    before = {p: p.read_bytes() for p in library.path.rglob("*") if p.is_file()}
    for words in ([], ["--deep"], ["--quick"], ["--json"]):
        assert run("verify", *words).code == 4
    assert {p: p.read_bytes() for p in library.path.rglob("*") if p.is_file()} == before
    kept = [json.loads(run("verify", "--json").out)["problems"] for _ in range(2)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2


@pytest.mark.parametrize("what", ["manifest", "ref"])
def test_gc_that_stops_at_damage_says_how_to_go_on(run: Any, library: Library, what: str) -> None:
    assert library.path is not None
    if what == "ref":
        (library.path / "refs" / "sums" / "latest").write_text("nonsense")
    else:
        hurt(library, "manifest")
    failed = run("gc", "--json")
    assert failed.code == 4
    assert failed.error["hint"] == REPAIR
    typed(run, failed.error["hint"])
    if what == "manifest":
        assert run("rm", "best", "poems").code == 0
    assert run("gc").code == 0


def test_a_library_that_lost_everything_is_told_at_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are listed a few times for all problems, not once for each."""
    library = Library.open(tmp_path / "library", create=True)
    for i in range(12):
        library.add(make_expert(i), f"e{i}")
    for path in (tmp_path / "library" / "objects" / "sha256").rglob("*/*"):
        path.unlink()
    listed, scan = [], type(library.store)._scan_refs
    monkeypatch.setattr(
        type(library.store), "_scan_refs", lambda self: listed.append(1) or scan(self)
    )
    problems = run("verify", "--json").document["problems"]
    assert [problem["kind"] for problem in problems] == ["missing"] * 12
    assert {problem["hint"][:18] for problem in problems} == {"adaptlib add SOURCE"[:18]}
    assert len(listed) < 5
