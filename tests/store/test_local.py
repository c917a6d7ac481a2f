"""A local store: its bytes on disk, and what happens when the disk or somebody else interferes."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from library_store import (
    Digest,
    LocalStore,
    NotAStore,
    ObjectCorrupt,
    ObjectNotFound,
    Ref,
    StoreExists,
    UnknownFormat,
    _files,
)


def place(store: LocalStore, digest: Digest) -> Path:
    return store.root / "objects/sha256" / digest.hex[:2] / digest.hex


def files(root: Path, *parts: str) -> list[str]:
    found = (path for path in root.joinpath(*parts).rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(root)) for path in found)


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


# --- the format ---


def test_every_byte_on_disk(local):
    digest = local.put(b"abc")
    local.move(Ref("team/sql", "v2"), digest, expect=None, reason="because")
    (entry,) = local.log("team/sql")
    hexa = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert {name: (local.root / name).read_bytes() for name in files(local.root)} == {
        "FORMAT": b'{"format": 1, "hash": "sha256"}\n',
        f"objects/sha256/ba/{hexa}": b"abc",
        "refs/team/sql/v2": f"sha256:{hexa}\n".encode(),
        "log/team/sql.jsonl": (
            f'{{"when": "{entry.when}", "ref": "team/sql:v2", "old": null, '
            f'"new": "sha256:{hexa}", "reason": "because"}}\n'
        ).encode(),
    }
    assert sorted(path.name for path in local.root.iterdir() if path.is_dir()) == [
        "log",
        "objects",
        "quarantine",
        "refs",
        "tmp",
        "trash",
    ]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o077, 0o400), (0o002, 0o444)])
def test_objects_are_read_only_under_the_umask(local, umask, mode):
    before = os.umask(umask)
    try:
        digests = [local.put(b"abc"), local.put([b"abcd"])]
    finally:
        os.umask(before)
    for digest in digests:
        assert stat.S_IMODE(place(local, digest).stat().st_mode) == mode


def test_an_object_has_one_name(local):
    assert place(local, local.put(b"abc")).stat().st_nlink == 1


# --- making and opening ---


def test_create_then_open(tmp_path):
    made = LocalStore.create(tmp_path / "a/b/library")
    digest = made.put(b"abc")
    found = LocalStore.open(str(made.root))
    assert found.root == made.root
    assert found.get(digest) == b"abc"


def test_the_constructor_looks_at_nothing(tmp_path):
    assert LocalStore(tmp_path / "nowhere").root == tmp_path / "nowhere"
    assert list(tmp_path.iterdir()) == []


def test_create_twice(local):
    digest = local.put(b"abc")
    with pytest.raises(StoreExists, match="library"):
        LocalStore.create(local.root)
    assert LocalStore.open(local.root).get(digest) == b"abc"


def test_create_among_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotAStore, match=r"thesis\.tex"):
        LocalStore.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_create_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        LocalStore.create(tmp_path / "file")


def test_create_goes_on_after_a_crash(local):
    (local.root / "FORMAT").unlink()
    (local.root / "trash").rmdir()
    with pytest.raises(NotAStore):
        LocalStore.open(local.root)
    LocalStore.create(local.root)
    assert LocalStore.open(local.root).put(b"abc") == Digest.of(b"abc")


def test_a_relative_path_survives_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore.create("library")
    monkeypatch.chdir("/")
    assert store.put(b"abc") in store


@pytest.mark.parametrize("name", ["nowhere", "file/x", "."])
def test_open_where_no_store_is(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStore, match="FORMAT"):
        LocalStore.open(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 2, "hash": "sha256"}',
        '{"format": 1, "hash": "blake3"}',
        '{"format": 1, "hash": "sha256", "packs": true}',
        "[]",
        "",
        "\0" * 32,
        "[" * 4000,
        " " * 5000,
    ],
)
def test_an_unknown_format(local, text):
    damage(local.root / "FORMAT", text.encode())
    with pytest.raises(UnknownFormat, match="FORMAT"):
        LocalStore.open(local.root)


def test_a_format_that_is_no_file(local):
    (local.root / "FORMAT").unlink()
    (local.root / "FORMAT").symlink_to("/dev/zero")
    with pytest.raises(UnknownFormat, match="FORMAT"):
        LocalStore.open(local.root)


# --- damage ---


def spoil_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damage(path, data)


def spoil_truncate(path: Path) -> None:
    damage(path, path.read_bytes()[:-1])


def spoil_empty(path: Path) -> None:
    damage(path, b"")


def spoil_extend(path: Path) -> None:
    damage(path, path.read_bytes() + b"\0")


def spoil_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def spoil_symlink(path: Path) -> None:
    """Even to the right bytes: they are somebody else's to change."""
    copy = path.parent.parent / "copy"
    copy.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(copy)


def spoil_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILERS = [
    spoil_flip,
    spoil_truncate,
    spoil_empty,
    spoil_extend,
    spoil_directory,
    spoil_symlink,
    spoil_fifo,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_damage_is_noticed_by_every_reader(local, children, spoil):
    digest = local.put(b"some bytes")
    spoil(place(local, digest))
    for read in (local.get, local.view):
        with pytest.raises(ObjectCorrupt, match=digest.hex) as error:
            read(digest)
        assert error.value.hint
    found = [(p.kind, p.digest) for p in local.verify(children).problems if p.digest]
    assert found == [("corrupt", digest)]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("data", [b"some bytes", [b"some ", b"bytes"]], ids=["whole", "pieces"])
def test_putting_again_heals_and_keeps_the_damaged_one(local, data, spoil):
    digest = local.put(b"some bytes")
    spoil(place(local, digest))
    assert local.put(data) == digest
    assert local.get(digest) == b"some bytes"
    assert stat.S_ISREG(place(local, digest).lstat().st_mode)
    (aside,) = (local.root / "quarantine").iterdir()
    assert aside.name.startswith(digest.hex + ".")
    assert files(local.root, "tmp") == []


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_quarantine_moves_and_never_deletes(local, spoil):
    digest = local.put(b"some bytes")
    spoil(place(local, digest))
    local.quarantine(digest)
    assert digest not in local
    with pytest.raises(ObjectNotFound):
        local.get(digest)
    assert len(list((local.root / "quarantine").iterdir())) == 1


def test_a_view_without_verify_does_not_hash(local):
    digest = local.put(b"some bytes")
    damage(place(local, digest), b"other bytes")
    assert local.view(digest, verify=False) == b"other bytes"


def test_what_the_disk_says_comes_through(local, monkeypatch):
    digest = local.put(b"abc")

    def fail(fd, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    monkeypatch.setattr(os, "readv", fail)
    for read in (local.get, local.view):
        with pytest.raises(OSError, match="Input/output"):
            read(digest)


def test_a_shard_that_is_a_symlink_is_not_written_through(local, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (local.root / "objects/sha256/ba").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        local.put(b"abc")
    assert list(outside.iterdir()) == []
    assert files(local.root, "tmp") == []


# --- writing ---


@pytest.mark.parametrize("call", ["write", "fsync", "link", "mkdir"])
@pytest.mark.parametrize("data", [b"abc", [b"abc"]], ids=["whole", "pieces"])
def test_a_full_disk_leaves_no_trace(local, monkeypatch, call, data):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        local.put(data)
    monkeypatch.undo()
    assert files(local.root) == ["FORMAT"]
    assert local.get(local.put(data)) == b"abc"


def test_short_writes_are_finished(local, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    data = bytes(range(256))
    assert local.get(local.put(data)) == data


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, code):
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    store = LocalStore.create(tmp_path / "library")
    digest = store.put(b"abc")
    assert store.put([b"abc"]) == digest
    assert store.get(digest) == b"abc"
    assert files(store.root, "tmp") == []
    with pytest.raises(StoreExists):
        LocalStore.create(tmp_path / "library")


def test_an_object_of_another_user_is_replaced_by_ours(local, monkeypatch):
    digest = local.put(b"abc")
    inode = place(local, digest).stat().st_ino

    def fail(path):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_files, "touch", fail)
    assert local.put(b"abc") == digest
    assert place(local, digest).stat().st_ino != inode
    assert files(local.root, "quarantine") == files(local.root, "tmp") == []


def test_data_is_on_disk_before_its_name_and_both_before_put_returns(local, monkeypatch):
    events = []
    fsync, link = os.fsync, os.link

    def name_of(fd):
        path = Path(f"/dev/fd/{fd}").resolve()
        return "data" if path.parent.name == "tmp" else path.name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"fsync {name_of(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda *paths: (events.append("link"), link(*paths)))
    digest = local.put(b"abc")
    if sys.platform.startswith("linux"):  # where /dev/fd tells names, and fsync is the last word
        assert events == ["fsync data", "link", "fsync ba", "fsync sha256"]
        events.clear()
        local.put(b"abc")
        assert events == [f"fsync {digest.hex}", "fsync ba", "fsync sha256"]


def test_leftovers_of_a_crash_are_no_objects(local, children):
    (local.root / "tmp/1-deadbeef").write_bytes(b"half")
    assert list(local.objects()) == []
    assert local.verify(children).ok


def test_a_killed_writer_leaves_a_store_that_works(local, children):
    code = """
import os, sys
from library_store import LocalStore
def half():
    yield b"half"
    os._exit(9)
LocalStore(sys.argv[1]).put(half())
"""
    done = run(code, str(local.root))
    assert done.wait() == 9
    assert len(files(local.root, "tmp")) == 1
    assert list(local.objects()) == []
    assert local.verify(children).ok


def run(code: str, *args: str) -> "subprocess.Popen[bytes]":
    source = Path(_files.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment)
