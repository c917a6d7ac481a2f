"""What a routing is given: the experts to choose among, saved routers, samples and prompts."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.experts import Expert, Library
    from adaptlib.routing import Router

SAMPLES = 20  # prompts of an expert's task that a router sees, as LoraRetriever has it


def pool(library: "Library", routers: list[str], experts: list[str]) -> list[str]:
    """The names to choose from: those that routers name come first, so that an expert goes by the
    name it was asked by; and no others where every router names its own."""
    from adaptlib.errors import UsageError

    from .selection import expand

    which = [found for name in routers if (found := name.partition(":")[2])]
    if len(which) == len(routers):
        return which
    chosen = expand(library, experts) or list(library)
    held = {library.digest(name) for name in chosen}
    for name in which:
        if library.digest(name) not in held:
            raise UsageError(
                f"named:{name} is none of --experts {','.join(experts)}", hint=f"--experts {name}"
            )
    return [*which, *chosen]


def saved(
    library: "Library", routers: list[str], experts: list[str], shortlist: int | None
) -> "tuple[Router, Mapping[str, Expert], list[str]] | None":
    """The router that `saved:NAME` asks for, or `KIND:NAME` for one that has to be of that kind,
    its experts and their digests; None where no router is saved."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.records import load_record
    from adaptlib.routing import ROUTERS, load_router

    kinds = {"saved", *ROUTERS} - {"named"}
    names = [name for name in routers if ":" in name and name.partition(":")[0] in kinds]
    if not names:
        return None
    if len(routers) > 1:
        raise UsageError(
            "a saved router knows its own experts, so it is asked alone",
            hint=f"--router {names[0]}",
        )
    if experts or shortlist is not None:
        option = "--experts" if experts else "--shortlist"
        raise UsageError(f"{names[0]} knows its own experts", hint=f"leave out {option}")
    kind, _, name = names[0].partition(":")
    router, held = load_router(library, name)
    if kind not in ("saved", router.name):
        raise UsageError(
            f"the router saved as {name} is {router.name}, not {kind}",
            hint=f"--router {router.name}:{name}",
        )
    return router, held, list(load_record(library.store, "routers", name)["experts"].values())


def shortlisted(
    library: "Library",
    names: list[str],
    base: Any,
    ids: Any,
    size: int,
    top_k: int | None,
    temperature: float | None,
) -> dict[str, float]:
    """The `size` of `names` to which Arrow would give most weight, with their shares of it."""
    from adaptlib.experts.prototypes import catalogue
    from adaptlib.routing.shortlist import shortlist

    last = 0.0

    def progress(done: int, count: int) -> None:
        nonlocal last
        if sys.stderr.isatty() and (done == count or time.monotonic() - last > 0.2):
            last = time.monotonic()
            end = "\n" if done == count else "\r"
            sys.stderr.write(f"Prototypes  {done:,} of {count:,}{end}")
            sys.stderr.flush()

    known = catalogue(library, names, progress=progress)
    given = {"top_k": top_k, "temperature": temperature}
    options = {key: value for key, value in given.items() if value is not None}
    return shortlist(known, base, ids, size=size, **options)


def samples(folder: Path, experts: "Mapping[str, Expert]") -> dict[str, list[str]]:
    """For each expert some prompts of its task: of the training rows of the file in `folder` that
    is called like its card's task, or like itself."""
    from adaptlib.errors import NotFoundError, UsageError
    from adaptlib.training import Row, read_task

    if not folder.is_dir():
        raise NotFoundError(
            f"no folder {folder} with samples", hint="--samples DIR, with one file a task"
        )
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.is_file()}
    found: dict[str, list[str]] = {}
    for name, expert in experts.items():
        asked = [str(expert.card.get("task")), name.partition(":")[0]]
        path = next((files[stem] for stem in asked if stem in files), None)
        if path is None:
            continue
        task = read_task(path)
        rows = task.split(next(iter(task.rows)))[:SAMPLES]
        found[name] = [task.prompt(row) for row in rows if isinstance(row, Row)]
        if not found[name]:
            raise UsageError(
                f"{path} is a task of another form; samples want rows with an input",
                hint="leave that file out of --samples",
            )
    if not found:
        raise NotFoundError(
            f"no file in {folder} is called like the task of one of {len(experts)} experts",
            hint=f"{folder}/{next(iter(experts.values())).card.get('task') or 'TASK'}.jsonl",
        )
    return found


def prompts(path: Path) -> list[str]:
    """Prompts, one a line."""
    from adaptlib.errors import NotFoundError, UsageError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFoundError(f"no file {path} with prompts") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no text file: {error}") from None
    found = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not found:
        raise UsageError(
            f"{path} holds no prompt", hint=r"one prompt a line; \n stands for a line break in it"
        )
    return found
