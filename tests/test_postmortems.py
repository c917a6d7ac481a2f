"""What went wrong in other stores, each as one test: it must not happen here.

The numbers are those of a review of post-mortems: of git, restic, ollama, huggingface_hub, DVC,
safetensors, icechunk and mttl.
"""

import errno
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from adaptlib.cli.main import invoke

from adaptlib.errors import ConflictError, CorruptError, NotFoundError, UsageError
from adaptlib.experts import Library, read_peft, write_peft
from adaptlib.experts.codec import pack, read_directory, unpack, write_directory
from library_store import Digest, GcAborted, LocalStore, ObjectCorrupt, Ref, _files, _lock
from library_store._process import identity
from tests.store.damages import object_path
from tests.tiny import make_expert, same_expert, state

NEVER = timedelta(0)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library.open(tmp_path / "library", create=True)
    library.add(make_expert(0), "good")
    return library


def children(_: Digest, data: bytes) -> list[Digest]:
    return [Digest.parse(line) for line in data.decode().split() if line.startswith("sha256:")]


def damage(library: Library, digest: str, data: bytes) -> None:
    assert library.path is not None
    path = object_path(library.path, digest)
    path.chmod(0o644)
    path.write_bytes(data)


def test_p1_no_two_writers_share_an_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub #4306: flock succeeded for everyone, so a second writer went on writing to
    what the first had published."""
    store = LocalStore.create(tmp_path / "library")
    whole = b"first half, second half"
    inodes: list[int] = []

    def pieces() -> Any:
        yield whole[:11]
        path = object_path(store.root, LocalStore(store.root).put(whole))
        inodes.append(path.stat().st_ino)
        assert path.read_bytes() == whole
        yield whole[11:]

    monkeypatch.setattr(_lock, "_acquire", lambda *_, **__: None)  # a lock that everybody gets
    digest = store.put(pieces())
    path = object_path(store.root, digest)
    assert (path.read_bytes(), path.stat().st_ino) == (whole, inodes[0])
    assert path.stat().st_mode & 0o222 == 0
    assert list((store.root / "tmp").iterdir()) == []


def test_p2_what_is_used_in_two_roles_is_verified(tmp_path: Path) -> None:
    """ollama #15504: a layer with the digest of the config was taken for verified."""
    store = LocalStore.create(tmp_path / "library")
    shared = store.put(b"both a manifest and a blob")
    above = store.put(f"{shared}".encode())
    store.move(Ref("config"), shared, expect=None)
    store.move(Ref("layer"), above, expect=None)
    path = object_path(store.root, shared)
    path.chmod(0o644)
    path.write_bytes(b"BOTH a manifest and a blob")
    for sizes in (None, lambda _, __: {shared: 26}):
        (problem,) = store.verify(children, sizes=sizes).problems
        assert (problem.digest, problem.refs) == (shared, (Ref("config"), Ref("layer")))
    with pytest.raises(ObjectCorrupt):
        store.get(shared)


def test_p3_gc_of_another_process_spares_an_add_that_runs(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ollama #15628, uv #15704: what was written and had no name yet was collected."""
    move, collected = LocalStore.move, []
    code = (
        "import sys; from adaptlib.experts import Library;"
        "print(len(Library.open(sys.argv[1]).gc().removed))"
    )

    def collecting(self: LocalStore, *words: Any, **more: Any) -> None:
        run = [sys.executable, "-c", code, str(library.path)]
        collected.append(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        move(self, *words, **more)

    monkeypatch.setattr(LocalStore, "move", collecting)
    library.add(make_expert(1), "new")
    assert collected == ["0\n"]
    assert library.verify(deep=True).ok
    assert same_expert(library["new"], make_expert(1))


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 40])
def test_p4_one_bad_manifest_does_not_wedge_the_others(
    library: Library, tmp_path: Path, data: bytes
) -> None:
    """ollama #7515: an empty manifest, and every command failed."""
    digest = library.add(make_expert(1), "bad").digest
    damage(library, digest, data)
    root = ["-L", str(library.path)]
    assert same_expert(library["good"], make_expert(0))
    write_directory(pack(make_expert(2)), tmp_path / "third")
    for words in (
        ["list"],
        ["show", "good"],
        ["export", "good", str(tmp_path / "out")],
        ["add", str(tmp_path / "third")],
        ["tag", "good", "good:v1"],
        ["mv", "bad", "worse"],
        ["rm", "worse"],
        ["list"],
        ["verify", "--repair"],
        ["verify"],
    ):
        assert invoke([*words, *root]) == 0, words


def test_p5_a_manifest_keeps_its_digest_wherever_it_goes(library: Library, tmp_path: Path) -> None:
    """ollama #15104: a manifest was written anew when it was pulled, and was another one then."""
    digest = library.digest("good")
    for hop in range(3):
        directory = tmp_path / f"hop{hop}"
        write_directory(library.packed("good"), directory)
        assert str(Digest.of((directory / "expert.json").read_bytes())) == digest
        library = Library.open(tmp_path / f"library{hop}", create=True)
        assert library.add(directory, "good").digest == digest
        assert library.store.get(Digest.parse(digest)) == (directory / "expert.json").read_bytes()


def test_p6_what_rm_leaves_is_told_and_what_is_cancelled_leaves_nothing(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    """ollama #18595, #14177, #4271: gigabytes that no command named or removed."""
    assert library.path is not None
    before = state(library)

    def cancelled() -> Any:
        yield b"x" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.store.put(cancelled())
    assert state(library) == before
    assert list((library.path / "tmp").iterdir()) == []
    library.add(make_expert(1), "gone")
    size = sum(path.stat().st_size for path in (library.path / "objects").rglob("*/*/*"))
    root = ["-L", str(library.path)]
    capsys.readouterr()
    assert invoke(["rm", "gone", "--json", *root]) == 0
    frees = json.loads(capsys.readouterr().out)["frees"]
    assert invoke(["gc", "--grace", "0", "--history", "0", "--json", *root]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == frees > 0
    left = sum(path.stat().st_size for path in (library.path / "objects").rglob("*/*/*"))
    assert left == size - frees
    assert state(library)["objects"] == before["objects"]


def test_p7_a_full_disk_leaves_the_source_alone(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC #10413: `dvc add` on a full disk removed the file that it was to keep."""
    write_directory(pack(make_expert(1)), tmp_path / "mine")
    source = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    before, write = state(library), os.write
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for room in (0, 1, 2, 3):
        left = [room]

        def some(fd: int, data: Any, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise full
            return write(fd, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", some)
            with pytest.raises(OSError, match="No space left"):
                library.add(tmp_path / "mine")
        assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == source
        assert state(library)["tags"] == before["tags"]
        assert library.verify(deep=True).ok
    assert same_expert(library[library.add(tmp_path / "mine").name], make_expert(1))


def test_p8_gc_of_one_library_takes_nothing_of_another(library: Library, tmp_path: Path) -> None:
    """DVC #7610: projects shared a cache, and gc in one removed the data of the others."""
    other = Library.open(tmp_path / "other", create=True)
    other.add(make_expert(0), "good")
    other.add(library.packed("good"), "mine")
    library.remove("good")
    assert len(library.gc(grace=NEVER, history=NEVER, allow_empty=True).removed) == 2
    assert other.verify(deep=True).ok
    assert same_expert(other["good"], make_expert(0))


@pytest.mark.parametrize("place", ["refs", "objects", "log"])
def test_p9_what_cannot_be_listed_is_not_nothing(
    library: Library, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """restic #4612: a list of snapshots that failed was an empty one, so prune removed all."""
    library.add(make_expert(1), "gone")
    library.remove("gone")
    before, listed = state(library), _files.list_directory

    def failing(path: Path) -> Any:
        if place in path.parts and path.name not in ("sha256", place):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listed(path)

    library.add(make_expert(2), "team/name")  # so that each place has a directory below it
    before = state(library)
    with monkeypatch.context() as patch:
        patch.setattr(_files, "list_directory", failing)
        with pytest.raises(GcAborted, match="nothing was removed"):
            library.gc(grace=NEVER, history=NEVER)
    assert state(library) == before
    assert len(library.gc(grace=NEVER, history=NEVER).removed) == 2


def test_p10_what_is_kept_is_what_the_source_holds(library: Library, tmp_path: Path) -> None:
    """restic #4677: a compressor wrote garbage, whose hash was right for ever after."""
    write_peft(make_expert(3), tmp_path / "peft")
    source = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name = library.add(tmp_path / "peft").name
    kept = safetensors.numpy.load(bytes(library.store.get(_blob(library, name))))
    assert len(kept) == len(source) == 4
    found = sorted((array.tobytes(), array.shape) for array in kept.values())
    assert found == sorted((array.tobytes(), array.shape) for array in source.values())
    assert not any(np.isnan(array).any() for array in kept.values())


def _blob(library: Library, name: str) -> Digest:
    return Digest.parse(library.manifest(name).blob.digest)


def test_p11_a_lock_of_a_dead_process_stops_nobody(library: Library) -> None:
    """restic #3219, #4324: a stale lock blocked a store until somebody knew `unlock`."""
    assert library.path is not None
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **_TEXT)
    record = {"machine": identity()[0], "pid": int(dead.stdout), "token": "x"}
    (library.path / "tmp" / "refs.lock").write_text(json.dumps(record))
    library.add(make_expert(1), "new")
    assert same_expert(library["new"], make_expert(1))
    assert not (library.path / "tmp" / "refs.lock").exists()


_TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


def test_p12_an_expert_is_written_over_what_it_was_read_from(tmp_path: Path) -> None:
    """safetensors #762, #764: saving to the file that is mapped filled it with zeros."""
    write_peft(make_expert(0), tmp_path / "peft")
    write_directory(pack(make_expert(1)), tmp_path / "own")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    before = weights.read_bytes()
    loaded = read_peft(tmp_path / "peft")
    write_peft(loaded, tmp_path / "peft")
    assert weights.read_bytes() == before
    again = read_peft(tmp_path / "peft")
    assert same_expert(again, loaded)
    for one, other in zip(again.deltas.values(), make_expert(0).deltas.values(), strict=True):
        assert one.dense().equal(other.dense())
    packed = read_directory(tmp_path / "own")
    write_directory(packed, tmp_path / "own")
    assert same_expert(unpack(packed), make_expert(1))
    assert same_expert(unpack(read_directory(tmp_path / "own")), make_expert(1))


def test_p13_what_is_there_in_part_is_not_taken_for_whole(library: Library, tmp_path: Path) -> None:
    """huggingface_hub #4394: a snapshot without some of its files was given as complete."""
    for missing in ("expert.json", "expert.safetensors"):
        write_directory(pack(make_expert(5)), tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(NotFoundError):
            library.add(tmp_path / missing, "part")
    write_directory(pack(make_expert(5)), tmp_path / "short")
    blob = tmp_path / "short" / "expert.safetensors"
    blob.write_bytes(blob.read_bytes()[:-4])
    with pytest.raises(CorruptError):
        library.add(tmp_path / "short", "part")
    assert "part" not in library
    object_path(library.path, str(_blob(library, "good"))).unlink()  # type: ignore[arg-type]
    for read in (library.packed, library.stream, library.__getitem__):
        with pytest.raises(CorruptError, match=r"no object.*used by good"):
            read("good")


def test_p14_weights_and_card_come_together_and_a_name_twice_is_a_conflict(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mttl: two files written in place, one after the other; a second expert of a name made the
    library corrupt."""
    before, put, count = state(library), LocalStore.put, []

    def second_fails(self: LocalStore, data: Any) -> Digest:
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.EIO, "the machine went down here")
        return put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", second_fails)
        with pytest.raises(OSError, match="went down"):
            library.add(make_expert(1), "new")
    assert state(library)["tags"] == before["tags"]
    assert library.verify(deep=True).ok
    with pytest.raises(ConflictError, match="taken"):
        library.add(make_expert(1), "good")
    assert same_expert(library["good"], make_expert(0))
    assert library.verify(deep=True).ok


def test_p15_no_two_names_differ_only_in_case(library: Library, tmp_path: Path) -> None:
    """icechunk: on macOS one of them replaced the other."""
    for name in ("Good", "GOOD", "good:V1", "Team/good"):
        with pytest.raises(UsageError, match="not a ref"):
            library.add(make_expert(1), name)
    write_directory(pack(make_expert(1)), tmp_path / "GOOD")
    with pytest.raises(ConflictError, match="good"):
        library.add(tmp_path / "GOOD")  # its name is made lower-case first
    assert library.path is not None
    (library.path / "refs" / "Good").mkdir()
    (library.path / "refs" / "Good" / "latest").write_text(f"{library.digest('good')}\n")
    assert [problem.kind for problem in library.verify().problems] == ["foreign"]
