"""Whether a library is well: where it is, what it holds, and what was left behind in it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adaptlib.errors import AdaptlibError
from library_store import StoreError

from . import out
from .doctor_disk import Check, look_at_disk

if TYPE_CHECKING:
    from adaptlib.experts.catalog import Catalog

DAY = 86_400.0


def look_at_library(path: Path | None) -> Iterator[Check]:
    """The settings, and the library that they or `path` lead to."""
    from adaptlib.experts.catalog import Catalog
    from adaptlib.experts.location import library_path
    from adaptlib.experts.settings import settings_files

    from .settings import check_tables

    try:
        files = settings_files()
        check_tables(files)
        where, why = library_path(path)
    except (AdaptlibError, OSError) as error:
        yield Check("settings", "fail", str(error), getattr(error, "hint", None))
        return
    yield Check("settings", "ok", ", ".join(str(file.path) for file in files) or "no files")
    try:
        catalog = Catalog.open(where)
        count = len(catalog.names())
    except (AdaptlibError, StoreError, OSError) as error:
        hint = getattr(error, "hint", None) or "see what is damaged: adaptlib verify"
        yield Check("library", "fail", f"{error} ({why})", hint)
        return
    yield Check("library", "ok", f"{where} ({why}), {out.count(count, 'expert')}")
    yield from _contents(catalog, where)
    yield from look_at_disk(where)


def _contents(catalog: "Catalog", root: Path) -> Iterator[Check]:
    format_ = root.joinpath("FORMAT").read_text(errors="replace").strip()
    yield Check("format", "ok", format_)
    try:
        objects = sum(1 for _ in catalog.store.objects())
        refs = len(catalog.store.refs())
        yield Check("objects", "ok", f"{objects:,}, and {out.count(refs, 'name')} of all kinds")
    except (StoreError, OSError) as error:
        yield Check("objects", "fail", str(error), "see what is damaged: adaptlib verify")
    for look in (_trash, _quarantine, _lock, _unfinished):
        try:
            yield look(root)
        except OSError as error:
            name = look.__name__.removeprefix("_")
            yield Check(name, "warn", str(error), "look at the rights of that directory")


def _trash(root: Path) -> Check:
    """What gc removed, and when it last did."""
    times, files, size = [], 0, 0
    for folder in root.joinpath("trash").iterdir():
        try:
            when = datetime.strptime(folder.name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            continue
        times.append((datetime.now(UTC) - when, folder.name))
        for file in folder.iterdir():
            files += 1
            size += file.lstat().st_size
    if not times:
        return Check("trash", "ok", "empty: gc removed nothing lately")
    youngest, oldest = min(times), max(times)
    held = f"{out.count(files, 'object')}, {out.size(size)}; gc last removed something "
    detail = held + out.ago(youngest[0])
    if oldest[0].total_seconds() > 7 * DAY:
        return Check("trash", "warn", f"{detail}; the oldest is past its 7 days", "adaptlib gc")
    return Check("trash", "ok", f"{detail}; to undo: adaptlib gc --restore {youngest[1]}")


def _quarantine(root: Path) -> Check:
    """Damaged files that were moved aside."""
    sizes = [file.lstat().st_size for file in root.joinpath("quarantine").iterdir()]
    if not sizes:
        return Check("quarantine", "ok", "empty")
    detail = f"{out.count(len(sizes), 'damaged file')}, {out.size(sum(sizes))}, moved aside"
    hint = f"adaptlib verify; where that is well: rm -r {root / 'quarantine'}/*"
    return Check("quarantine", "warn", detail, hint)


def _lock(root: Path) -> Check:
    """Whether a process holds the lock of the names, or died with it."""
    from library_store._lock import look

    path = root / "tmp" / "refs.lock"
    found = look(path)
    if found is None:
        return Check("names", "ok", "not locked")
    who, age, stale = found
    if stale:
        detail = f"locked by {who}, which is gone"
        return Check("names", "warn", detail, "nothing: the next command that needs it takes it")
    if age > 5:
        detail = f"locked by {who} for {age:,.0f} s; that takes milliseconds"
        return Check("names", "warn", detail, f"look at that process; if it is gone: rm {path}")
    return Check("names", "ok", f"locked by {who} just now")


def _unfinished(root: Path) -> Check:
    """Writes that never ended."""
    now, left = datetime.now(UTC).timestamp(), 0
    for file in root.joinpath("tmp").iterdir():
        try:
            left += file.name != "refs.lock" and now - file.lstat().st_mtime > DAY
        except FileNotFoundError:  # finished just now
            continue
    if left:
        detail = f"{out.count(left, 'file')} of writes that never ended"
        return Check("unfinished", "warn", detail, "adaptlib gc")
    return Check("unfinished", "ok", "no writes that never ended")
