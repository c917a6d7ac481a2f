"""What a command does to the world, seen by an audit hook: every deed that no input may cause.

Unpickling, importing what an input names, compiling or running what it holds, starting processes,
reaching for the network, loading libraries, and writing outside the directories that are allowed.
All code and all module names in the corpus hold MARK, which is how they are known.
"""

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARK = "evil_module"

_PROCESSES = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "subprocess.Popen",
)
_NETWORK = (
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "urllib.Request",
)
# Of what changes files: the places of a path among the arguments, and of the directory it is from.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, None),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "shutil.move": ((0, None), (1, None)),
    "shutil.rmtree": ((0, 1),),
    "sqlite3.connect": ((0, None),),
}
_FOLLOWING = ("os.truncate", "os.chmod", "sqlite3.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_on: list[Callable[[str, tuple[Any, ...]], None]] = []


def start(allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Begin to watch. Gives the lists that deeds, and the names of opened files, are added to."""
    deeds: list[str] = []
    opened: list[str] = []
    roots = [os.path.realpath(path) for path in (*allowed, os.devnull)]

    def outside(path: Any, *, below: int | None = None, follow: bool = True) -> bool:
        if isinstance(path, int) or path == ":memory:":
            return False
        where = os.fsdecode(path)
        if isinstance(below, int) and below >= 0:
            where = f"{os.path.realpath(f'/proc/self/fd/{below}')}/{where}"
        folder, name = os.path.split(where)
        # What is opened is what a link leads to; what is removed or renamed is the link.
        whole = os.path.realpath(where if follow else folder or ".")
        if not follow:
            whole = f"{whole}/{name}"
        return not any(whole == root or whole.startswith(root + os.sep) for root in roots)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" or event in _PROCESSES or event in _NETWORK:
            deeds.append(f"{event}: {arguments!r:.200}")
        elif event == "import" and MARK in str(arguments[0]):
            deeds.append(f"{event}: {arguments[0]}")
        elif event in ("compile", "exec") and MARK in _code(arguments):
            deeds.append(f"{event}: {_code(arguments)[:200]}")
        elif event == "ctypes.dlopen" and MARK in str(arguments[0]):
            deeds.append(f"{event}: {arguments[0]}")
        elif event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & _WRITING) or bool(set(mode or "") & set("wax+"))
            follow = not (flags or 0) & (os.O_EXCL | os.O_NOFOLLOW)
            if not isinstance(path, int):
                opened.append(os.fsdecode(path))
                if writes and outside(path, follow=follow):
                    deeds.append(f"written outside: {os.fsdecode(path)}")
        elif event in _CHANGES:
            for place, folder in _CHANGES[event]:
                below = (
                    arguments[folder] if folder is not None and folder < len(arguments) else None
                )
                if outside(arguments[place], below=below, follow=event in _FOLLOWING):
                    deeds.append(f"{event} outside: {arguments[place]}")

    def recorded(name: str) -> Callable[..., Any]:
        def called(*_: object, **__: object) -> Any:
            deeds.append(f"{name} was called")
            raise RuntimeError(name)

        return called

    pickle.load, pickle.loads = recorded("pickle.load"), recorded("pickle.loads")
    if torch := sys.modules.get("torch"):
        vars(torch)["load"] = recorded("torch.load")
    if not _on:
        sys.addaudithook(lambda event, arguments: [hook(event, arguments) for hook in _on] and None)
    _on[:] = [note]
    return deeds, opened


def stop() -> None:
    """Watch no more."""
    _on.clear()


def _code(arguments: tuple[Any, ...]) -> str:
    """The text that is compiled, or the names and constants of the code that is run."""
    first = arguments[0]
    if hasattr(first, "co_names"):
        return f"{first.co_filename} {first.co_names} {first.co_consts}"
    if isinstance(first, bytes | bytearray):
        first = bytes(first).decode("latin-1")
    return f"{first} {arguments[1] if len(arguments) > 1 else ''}"


# -- deeds that must be seen, or the hook could not fail -------------------------------------------


class Payload:
    """Unpickling it writes a file. `where` is the file."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return (os.system, (f"echo {MARK} > '{self.where}'",))


def _unpickle(folder: Path) -> None:
    import _pickle

    _pickle.loads(pickle.dumps(Payload(folder / "ran")))


def _unpickle_plainly(_: Path) -> None:
    try:
        pickle.loads(pickle.dumps([1, 2]))
    except RuntimeError:
        return


def _import(folder: Path) -> None:
    (folder / f"{MARK}.py").write_text("")
    sys.path.insert(0, str(folder))
    __import__(MARK)


def _network(_: Path) -> None:
    import socket

    with socket.socket() as one:
        one.settimeout(0.01)
        try:
            one.connect(("127.0.0.1", 9))
        except OSError:
            return


def _remove(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_text("")
    outside.unlink()


def _through_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder / "link" / "file").write_text("")


def _shrink(folder: Path) -> None:
    """Add an adapter whose weights lose their end once the header has been read."""
    from adaptlib.experts import Library, peft

    file, read = folder / "shrinking" / "adapter_model.safetensors", peft.read_tensors

    def shrunk(source: str, view: memoryview) -> Any:
        found = read(source, view)
        os.truncate(file, 4096)
        return found

    peft.read_tensors = shrunk
    Library.open(folder / "library").add(folder / "shrinking")


DEEDS: dict[str, Callable[[Path], Any]] = {
    "add what shrinks": _shrink,
    "unpickle": _unpickle,
    "unpickle plainly": _unpickle_plainly,
    "import": _import,
    "compile": lambda _: eval(f"'{MARK}'"),  # the deed
    "process": lambda _: os.system("true"),
    "network": _network,
    "write outside": lambda folder: (folder.parent / "written").write_text(""),
    "write through a link": _through_link,
    "remove outside": _remove,
    "nothing": lambda folder: (folder / "inside").write_text(""),
}
