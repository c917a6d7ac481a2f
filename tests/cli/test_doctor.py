"""doctor: what it finds out by trying, what it says of it, and that it leaves nothing behind."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from adaptlib.cli import doctor, doctor_disk
from adaptlib.cli.doctor_disk import file_system, look_at_disk

from adaptlib.experts import Library
from library_store import _process

TRIED = ("writable", "clock", "lock", "flock", "hard links", "sync", "case")


def checks(run: Any, *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    result = run("doctor", "--no-device", "--json", *words)
    assert result.code == code, result.out
    found = result.document["checks"]
    assert len({check["name"] for check in found}) == len(found)
    for check in found:  # what is not well says what to do
        assert (check["hint"] is None) == (check["status"] == "ok"), check
    return {check["name"]: check for check in found}


def everything(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


def test_a_library_that_is_well(run: Any, library: Library, tmp_path: Path) -> None:
    before = everything(tmp_path)
    found = checks(run)
    assert everything(tmp_path) == before
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}
    assert set(TRIED) <= set(found)
    assert "4 experts" in found["library"]["detail"]
    assert "ADAPTLIB_LIBRARY" in found["library"]["detail"]
    assert found["objects"]["detail"].startswith("6, and 4 names")
    assert "one alone created each of 100" in found["lock"]["detail"]


def test_for_people_and_for_programs(run: Any, library: Library) -> None:
    shown = run("doctor", "--no-device").out
    assert shown.startswith("STATUS")
    assert run("doctor", "--no-device", "-q").out == ""
    plain = run("doctor", "--no-device", "--plain").out.splitlines()
    assert plain[0] == "name\tstatus\tdetail\thint"
    assert all(line.count("\t") == 3 for line in plain)


def test_the_device_is_asked_for_last_and_only_if_wanted(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "device" not in checks(run)
    assert run("doctor", "--json").document["checks"][-1]["name"] == "device"
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("doctor")
    assert result.code == 1
    assert "PyTorch does not load" in result.out


def test_without_the_device_torch_is_not_loaded(library: Library, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom adaptlib.cli.main import invoke\n"
        "status = invoke(['doctor', '--no-device', '-q', '-L', sys.argv[1]])\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "library")], check=False)
    assert done.returncode == 0


def test_no_library_and_bad_settings_fail(run: Any, tmp_path: Path) -> None:
    found = checks(run, code=1)
    assert found["library"]["status"] == "fail"
    assert "adaptlib init" in found["library"]["hint"]
    settings = tmp_path / ".adaptlib.toml"
    settings.write_text("x = \n")
    found = checks(run, code=1)
    assert f"{settings}:1" in found["settings"]["detail"]


def test_damage_is_found(run: Any, library: Library, tmp_path: Path) -> None:
    ref = tmp_path / "library" / "refs" / "poems" / "latest"
    ref.write_text("nonsense")
    found = checks(run, code=1)
    assert "poems/latest" in found["library"]["detail"]


# --- the disk ----------------------------------------------------------------------------------


def test_a_lock_that_lies_is_found(
    run: Any, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everybody(path: str) -> bool:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        return True

    before = everything(tmp_path)
    monkeypatch.setattr(doctor_disk, "_create", everybody)
    found = checks(run, code=1)
    assert found["lock"]["status"] == "fail"
    assert "two processes created the same file" in found["lock"]["detail"]
    assert "one process at a time" in found["lock"]["hint"]
    monkeypatch.setattr(doctor_disk, "_race", lambda base: (set(), {1}))
    assert "99 of 100 files" in checks(run, code=1)["lock"]["detail"]
    assert everything(tmp_path) == before


def test_a_flock_that_lies_is_found(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    found = checks(run)
    assert found["flock"]["status"] == "warn"
    assert "granted to two" in found["flock"]["detail"]

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert "does without" in checks(run)["flock"]["detail"]


def test_a_library_for_reading_alone(
    run: Any, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def refused(path: Path, data: bytes) -> int:
        if path.parent.name == "tmp":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return write(path, data)

    before = everything(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", refused)
    found = checks(run)
    assert found["writable"]["status"] == "warn"
    assert "Read-only file system" in found["writable"]["detail"]
    assert not {"lock", "flock", "clock", "case"} & set(found)
    assert everything(tmp_path) == before


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
def test_a_directory_without_the_right_to_write(run: Any, library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "library" / "tmp"
    folder.chmod(0o555)
    try:
        assert checks(run)["writable"]["status"] == "warn"
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("shift", "status", "says"),
    [(-60, "warn", "60 s behind"), (60, "warn", "60 s ahead"), (3600, "fail", "3,600 s ahead")],
)
def test_a_clock_that_differs_from_that_of_files(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch, shift: int, status: str, says: str
) -> None:
    here = types.SimpleNamespace(time=lambda: time.time() - shift, monotonic=time.monotonic)
    monkeypatch.setattr(doctor_disk, "time", here)
    found = checks(run, code=int(status == "fail"))["clock"]
    assert found["status"] == status
    assert any(text in found["detail"] for text in (says, says.replace("60 s", "61 s")))
    assert "set the clock" in found["hint"]


def test_links_and_syncs_that_are_not_there(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(number: int) -> Any:
        def call(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "link", refused(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    found = checks(run)
    assert found["hard links"]["status"] == "ok"
    assert "renamed instead" in found["hard links"]["detail"]
    assert found["sync"]["status"] == "warn"
    assert "power cut" in found["sync"]["detail"]
    monkeypatch.setattr(os, "fsync", refused(errno.EIO))
    assert "Input/output error" in checks(run)["sync"]["detail"]


@pytest.mark.parametrize(
    ("free", "left", "status"), [(10**12, 10**6, "ok"), (10**8, 10**3, "warn"), (10**6, 10, "fail")]
)
def test_little_room(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch, free: int, left: int, status: str
) -> None:
    real = os.statvfs("/")
    fields = {"f_bavail": free, "f_frsize": 1, "f_files": 10**7, "f_favail": left}
    room = types.SimpleNamespace(
        **{n: getattr(real, n) for n in dir(real) if n[:2] == "f_"} | fields
    )
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    found = checks(run, code=int(status == "fail"))
    assert (found["disk"]["status"], found["inodes"]["status"]) == (status, status)
    room.f_files = 0
    assert "inodes" not in checks(run, code=int(status == "fail"))


MOUNTS = r"""rootfs / rootfs rw 0 0
/dev/sda1 / ext4 rw 0 0
server:/x /mnt nfs4 rw 0 0
tmpfs /mnt/in\040memory tmpfs rw 0 0
//server/x /mnt/deep/er cifs rw 0 0
garbage
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"), ("/home/x", "ext4"), ("/mnt", "nfs4"), ("/mnt/x/y", "nfs4"),
        ("/mntx", "ext4"), ("/mnt/in memory/x", "tmpfs"), ("/mnt/deep", "nfs4"),
        ("/mnt/deep/er/x", "cifs"),
    ],
)  # fmt: skip
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path, path: str, kind: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == kind
    assert file_system(Path(path), tmp_path / "none") is None


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("ext4", "ok", "ext4"),
        ("fuse.sshfs", "warn", "over the network"),
        ("nfs", "warn", "over the network"),
        ("tmpfs", "warn", "in memory"),
        (None, "ok", "does not tell"),
    ],
)
def test_a_kind_of_file_system_that_is_not_for_keeping(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str | None, status: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor_disk, "file_system", lambda *_: kind)
    found = next(check for check in look_at_disk(tmp_path / "library"))
    assert found.status == status
    assert says in found.detail
    assert (found.hint is None) == (status == "ok")


# --- what is left behind -----------------------------------------------------------------------


def test_trash_quarantine_and_writes_that_never_ended(
    run: Any, library: Library, tmp_path: Path
) -> None:
    root = tmp_path / "library"
    run("rm", "sums")
    collected = run("gc", "--grace", "0", "--history", "0", "--json").document
    found = checks(run)
    assert "2 objects" in found["trash"]["detail"]
    assert f"--restore {collected['id']}" in found["trash"]["detail"]
    old = datetime.now(UTC) - timedelta(days=9)
    (root / "trash" / collected["id"]).rename(root / "trash" / f"{old:%Y%m%dT%H%M%SZ}-00000000")
    found = checks(run)
    assert found["trash"]["status"] == "warn"
    assert "9 days ago" in found["trash"]["detail"]
    (root / "quarantine" / "x.1").write_bytes(b"damaged")
    (root / "tmp" / "1-abc").write_bytes(b"")
    (root / "tmp" / "1-young").write_bytes(b"")
    os.utime(root / "tmp" / "1-abc", (0, 0))
    found = checks(run)
    assert found["quarantine"]["status"] == found["unfinished"]["status"] == "warn"
    assert "1 damaged file, 7 B" in found["quarantine"]["detail"]
    assert "1 file of writes" in found["unfinished"]["detail"]
    assert found["unfinished"]["hint"] == "adaptlib gc"


def test_a_lock_and_who_holds_it(run: Any, library: Library, tmp_path: Path) -> None:
    path = tmp_path / "library" / "tmp" / "refs.lock"
    machine, pid = _process.identity()

    def lock(pid: int, age: float) -> dict[str, Any]:
        path.write_text(json.dumps({"machine": machine, "pid": pid, "token": "x"}))
        os.utime(path, (time.time() - age,) * 2)
        return checks(run)["names"]

    assert checks(run)["names"]["detail"] == "not locked"
    assert lock(pid, 0)["status"] == "ok"
    assert f"process {pid}" in lock(pid, 0)["detail"]
    held = lock(pid, 90)
    assert held["status"] == "warn"
    assert "90 s" in held["detail"]
    stale = lock(_gone(), 1)
    assert stale["status"] == "warn"
    assert "which is gone" in stale["detail"]
    assert run("tag", "poems", "again").code == 0  # as the hint says
    assert checks(run)["names"]["detail"] == "not locked"


def _gone() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen(["true"]) as ended:
        pass
    return ended.pid


def test_packages_that_are_not_there(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("adaptlib", "no-such-package", "peft-no"))
    monkeypatch.setattr(doctor, "OPTIONAL", ("peft-no",))
    found = checks(run, code=1)
    assert found["no-such-package"]["hint"] == "pip install no-such-package"
    assert found["peft-no"]["status"] == "ok"
