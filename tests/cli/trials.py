"""Commands on a failing disk: each trial is one command in a copy of a library, and what holds
after it.

    python -m tests.cli.trials TEMPLATE GC_ID      names of cases on stdin, figures on stdout

Trials run in a process of their own, which checks no types while it runs: there are thousands.
"""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final
from unittest import mock

import typer
from adaptlib.cli import main as main_

from adaptlib.experts.references import children
from library_store import LocalStore, NotAStore, _process
from tests.soak import FACTOR
from tests.store.faulty import CODES, Disk, Fault, failing, lay, pairs, remove, schedule

ROUNDS = 2 if FACTOR == 1 else len(CODES)  # errors that each call fails with
PAIRS = 0 if FACTOR == 1 else 20 * FACTOR  # of faults, for each command


@final
@dataclass(frozen=True)
class Case:
    """A command. `words` may hold {gc}, the id of an earlier gc. `without` is removed before."""

    words: tuple[str, ...]
    without: str = ""


CASES: Mapping[str, Case] = {
    "add": Case(("add", "peft", "--name", "new")),
    "add, the base new": Case(("add", "peft"), without="library/derived"),
    "add from adaptlib": Case(("add", "one")),
    "add again": Case(("add", "kept", "--name", "poems")),
    "add --replace": Case(("add", "one", "--name", "poems", "--replace")),
    "add two": Case(("add", "one", "two")),
    "tag": Case(("tag", "poems", "poems:v2")),
    "tag --replace": Case(("tag", "sums", "best", "--replace")),
    "mv": Case(("mv", "sums", "team/sums")),
    "mv of two tags": Case(("mv", "poems", "verses")),
    "rm": Case(("rm", "sums")),
    "rm of two tags": Case(("rm", "poems")),
    "rm of two names": Case(("rm", "sums", "best")),
    "gc": Case(("gc",)),
    "gc --restore": Case(("gc", "--restore", "{gc}")),
    "init": Case(("init", "library"), without="library"),
    "init of one that is there": Case(("init", "library")),
    "verify": Case(("verify",)),
    "verify --deep": Case(("verify", "--deep")),
    "export": Case(("export", "poems", "out/put")),
    "export for adaptlib": Case(("export", "sums", "out/put", "--format", "adaptlib")),
    "list": Case(("list",)),
    "list without an index": Case(("list",), without="library/index.db"),
    "show": Case(("show", "poems")),
}


# -- looking --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Look:
    """What a command may change: names (None where there is no library), objects, what is in the
    trash and in tmp/, and what was exported."""

    refs: Mapping[str, str] | None
    objects: frozenset[str]
    trash: frozenset[str]
    temporary: frozenset[str]
    exported: Mapping[str, bytes]


def look(root: Path, *, logged: bool = True) -> Look:
    """The state of a trial. AssertionError where the library is damaged, or, if all is to be
    `logged`, where a log says otherwise than its ref."""
    out = {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "out").rglob("*"))
        if path.is_file()
    }
    try:
        store = LocalStore.open(root / "library")
    except NotAStore:
        return Look(None, frozenset(), frozenset(), frozenset(), out)
    report = store.verify(children)
    assert report.ok, report.problems
    refs = {str(ref): str(digest) for ref, digest in store.refs().items()}
    for ref in store.refs() if logged else ():
        entries = [entry for entry in store.log(ref.name) if entry.ref == ref]
        assert str(entries[-1].new) == refs[str(ref)], f"the log says otherwise of {ref}"
    trash = frozenset(path.name for path in (root / "library/trash").glob("*/*"))
    objects = frozenset(digest.hex for digest in store.objects())
    temporary = frozenset(path.name for path in (root / "library/tmp").iterdir())
    return Look(refs, objects, trash, temporary, out)


def sources(root: Path) -> dict[str, tuple[bytes, int]]:
    """Each file that a command only reads: its bytes and when it was written."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for name in ("base", "kept", "one", "two", "peft")
        for path in sorted((root / name).rglob("*"))
        if path.is_file()
    }


# -- trials ---------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What a command said, and how things are after it."""

    code: int
    out: str
    err: str
    disk: Disk
    look: Look


class Clean(NamedTuple):
    """How things were, and the command as it goes on a good disk."""

    before: Look
    done: Trial


@final
class Bench:
    """Where trials are run: in `root`, on copies of `template`."""

    def __init__(self, template: Path, gc_id: str, root: Path) -> None:
        self.template, self.gc_id, self.root = template, gc_id, root
        self.sources = sources(template)
        # A command's process is gone after it, and so is this one's.
        gone = subprocess.Popen(["true"])
        gone.wait()
        self.identity = (_process.identity()[0], gone.pid)

    def run(self, case: Case, *faults: Fault, more: tuple[str, ...] = ()) -> Trial:
        """The command, in a fresh copy."""
        lay(self.template, self.root)
        if case.without:
            remove(self.root / case.without)
        return self.again(case, *faults, more=more)

    def again(self, case: Case, *faults: Fault, more: tuple[str, ...] = ()) -> Trial:
        """The command, in the last copy as it was left."""
        words = [word.replace("{gc}", self.gc_id) for word in (*case.words, *more)]
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(_process, "identity", return_value=self.identity),
            failing(self.root, *faults) as disk,
        ):
            code = main_.invoke(words) if words else 0
        assert sources(self.root) == self.sources, "a source was changed"
        # A second fault may hit what takes the first one back: the error says that it may have.
        now = look(self.root, logged=len(faults) < 2)
        return Trial(code, out.getvalue(), err.getvalue(), disk, now)

    def clean(self, case: Case) -> Clean:
        before = self.run(Case((), case.without)).look
        done = self.run(case)
        assert done.code == 0, done.err
        return Clean(before, done)


# -- what must hold -------------------------------------------------------------------------------


def check(clean: Clean, done: Trial, *, as_json: bool) -> None:
    """The command happened and said so, or did not and said why."""
    check_words(done.code, done.out, done.err, as_json=as_json)
    assert done.disk.open == {}, "descriptors were left open"
    unlinked = {call.rpartition("/")[2] for call in done.disk.failed if call.startswith("unlink")}
    assert done.look.temporary <= unlinked, "something is left in tmp/"
    before, goal = clean.before, clean.done.look
    assert before.objects | before.trash <= done.look.objects | done.look.trash
    at_base = any("base/" in call for call in done.disk.failed)
    if done.code == 0 and at_base and "is not on this machine" in done.out + done.err:
        # A base model that may not be read is not here, and the expert not pinned to it.
        assert (done.look.refs or {}).keys() == (goal.refs or {}).keys()
    elif done.code == 0:
        assert done.look.refs == goal.refs
        assert done.look.exported == goal.exported
        assert done.look.objects >= goal.objects
        if not as_json:
            assert done.out.splitlines()[:1] == clean.done.out.splitlines()[:1]
    elif before.refs is not None:
        assert done.look.refs == before.refs
        assert done.look.exported == before.exported


def check_words(code: int, out: str, err: str, *, as_json: bool) -> None:
    """One sentence where something failed, one document where that was asked for; no traceback."""
    assert 0 <= code <= 7
    assert "Traceback" not in err
    assert "bug in adaptlib" not in err
    if as_json:
        document: Any = json.loads(out or err.splitlines()[-1])
        if not out:
            assert document["schema"] == "adaptlib.error/1"
            assert document["error"]["code"] == code
            assert document["error"]["message"]
    elif code and not out:
        assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
    elif not code:
        assert "Error:" not in err


def check_again(clean: Clean, again: Trial) -> None:
    """The same command goes through on a disk that is well again."""
    assert again.code == 0, again.err
    goal = clean.done.look
    assert again.look.refs == goal.refs
    assert again.look.exported == goal.exported
    assert again.look.objects >= goal.objects


def each_name_is_old_or_new(clean: Clean, now: Look) -> bool:
    """Whether any name is elsewhere than before."""
    before, after, refs = (at.refs or {} for at in (clean.before, clean.done.look, now))
    for name in before.keys() | after.keys() | refs.keys():
        assert refs.get(name) in (before.get(name), after.get(name)), name
    return refs != before


# -- all trials of a case -------------------------------------------------------------------------


def run_case(bench: Bench, name: str) -> dict[str, Any]:
    """Figures; `broken` has a line for each trial after which something did not hold."""
    case, clean = CASES[name], bench.clean(CASES[name])
    broken: list[str] = []
    used: set[str] = set()
    failed = 0
    planned = schedule(clean.done.disk, rounds=ROUNDS, turn=list(CASES).index(name))
    for number, fault in enumerate(planned):
        done = None
        as_json = number % 2 == 1
        try:
            done = bench.run(case, fault, more=("--json",) if as_json else ())
            check(clean, done, as_json=as_json)
            if done.code and (FACTOR > 1 or not as_json):
                check_again(clean, bench.again(case))
        except Exception as error:
            broken.append(said(fault, done, error))
        else:
            used |= {fault.kind} if done.disk.failed else set()
            failed += done.code != 0
    for two in pairs(clean.done.disk, number=PAIRS, seed=len(name)):
        done = None
        try:
            done = bench.run(case, *two)
            check_two(bench, case, clean, done)
        except Exception as error:
            broken.append(said(two, done, error))
    return {
        "calls": len(clean.done.disk.calls),
        "trials": len(planned) + PAIRS,
        "failed": failed,
        "used": sorted(used),
        "broken": broken,
    }


def check_two(bench: Bench, case: Case, clean: Clean, done: Trial) -> None:
    """What one fault began to take back, another may keep it from: then a name has moved."""
    check_words(done.code, done.out, done.err, as_json=False)
    moved = each_name_is_old_or_new(clean, done.look)
    before = clean.before
    assert before.objects | before.trash <= done.look.objects | done.look.trash
    if done.code == 0:
        assert done.look.refs == clean.done.look.refs
    elif not moved and done.look.exported == before.exported:
        check_again(clean, bench.again(case))


def said(faults: Any, done: Trial | None, error: Exception) -> str:
    words = "" if done is None else f"{done.disk.failed} -> {done[:3]}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = 0 if trace is None else trace.tb_lineno
    return f"{faults}: {words}: {type(error).__name__} at line {line} {str(error)[:600]}"


def main() -> None:
    """See above."""
    os.fsync = lambda fd: None  # which no test here could see
    # The same few command lines, thousands of times.
    main_.application = functools.cache(main_.application)
    typer.main.get_command = functools.cache(typer.main.get_command)
    template, gc_id = Path(sys.argv[1]), sys.argv[2]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="adaptlib-faults-", dir=memory) as folder:
        root = Path(folder, "trial")
        root.mkdir()
        os.chdir(root)
        os.environ["ADAPTLIB_LIBRARY"] = str(root / "library")
        bench = Bench(template, gc_id, root)
        for line in sys.stdin:
            name = line.strip()
            try:
                figures = run_case(bench, name)
            except Exception as error:  # not even without a fault
                figures = {"broken": [said((), None, error)]}
            print(json.dumps({"name": name, **figures}), flush=True)
        os.chdir(folder)


if __name__ == "__main__":
    main()
