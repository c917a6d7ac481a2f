"""A process that is killed at any moment loses nothing that it has acknowledged."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest

from library_store import Digest, LocalStore
from tests.soak import FACTOR, report
from tests.store.killed import Op, stream

KILLS = 500 * FACTOR
LONGEST = 0.06  # seconds that a worker lives
GENERATION = 25  # kills of workers on one library
FIGURES = (
    *("kills", "begun", "in flight", "acknowledged", "done but not acknowledged", "half done"),
    *("locks left", "taken over"),
)

Refs = Mapping[tuple[str, str], str]  # digest by name and tag
ROOT = Path(__file__).parents[2]


def pair(name: str) -> tuple[str, str]:
    first, colon, tag = name.partition(":")
    return first, tag if colon else "latest"


def states(op: Op, refs: Refs, digests: list[tuple[str, str]]) -> list[Refs] | None:
    """The states that an operation goes through, the first and the last ones too; None where it is
    refused. So much for what a library promises; how it does it is not looked at."""
    if op.kind in ("add", "replace"):
        return set_one(refs, op.words[1], digests[int(op.words[0])][0], op.kind == "replace")
    if op.kind in ("tag", "retag"):
        found = lookup(refs, op.words[0])
        return found and set_one(refs, op.words[1], found, op.kind == "retag")
    if op.kind == "rm":
        return walk(refs, [(at, None) for at in tags_of(refs, op.words[0])])
    if op.kind == "mv":
        return renamed(refs, *op.words)
    return [refs]


def set_one(refs: Refs, name: str, digest: str, replace: bool) -> list[Refs] | None:
    now = refs.get(pair(name))
    if now not in (None, digest) and not replace:
        return None
    return [refs] if now == digest else walk(refs, [(pair(name), digest)])


def lookup(refs: Refs, name: str) -> Any:
    """What a name means: without a tag the latest, or the last there is."""
    tagged = [refs[at] for at in sorted(refs) if ":" not in name and at[0] == name]
    return refs.get(pair(name)) or (tagged[-1] if tagged else None)


def tags_of(refs: Refs, name: str) -> list[tuple[str, str]]:
    return [at for at in sorted(refs) if at == pair(name) or (":" not in name and at[0] == name)]


def renamed(refs: Refs, old: str, new: str) -> list[Refs] | None:
    single = ":" in old or ":" in new
    moved = [at for at in tags_of(refs, old) if not single or at == pair(old)]
    goal = {at: pair(new) if single else (pair(new)[0], at[1]) for at in moved}
    there = [at for at in moved if goal[at] != at and refs.get(goal[at]) == refs[at]]
    for taken in refs if len(there) < len(moved) else ():
        mine = taken in [goal[at] for at in there]
        if not mine and (taken in goal.values() or (len(moved) > 1 and taken[0] == pair(new)[0])):
            return None
    made = [(goal[at], refs[at]) for at in moved if at not in there]
    return walk(refs, [*made, *((at, None) for at in moved)])


def walk(refs: Refs, moves: list[tuple[tuple[str, str], str | None]]) -> list[Refs] | None:
    found: list[Refs] = [refs]
    for at, digest in moves:
        step = {key: value for key, value in found[-1].items() if key != at}
        found.append(step if digest is None else step | {at: digest})
    return found if moves else None


def blobs_of(digest: Digest, data: bytes) -> list[Digest]:
    """What a manifest refers to, read without the library's own code."""
    is_manifest = data.startswith(b'{"base"')
    return [Digest.parse(json.loads(data)["blob"]["digest"])] if is_manifest else []


@final
@dataclass
class Run:
    """One library under killed workers: what it must hold, and what happened."""

    digests: list[tuple[str, str]]
    figures: dict[str, int]
    refs: Refs = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)  # objects that an acknowledged add has put
    unlogged: set[tuple[str, str]] = field(default_factory=set)  # moved by an operation in flight
    lock_was_left: bool = False

    def after(self, root: Path, seed: int, said: list[str]) -> None:
        """Check a library whose worker was killed when it had said this."""
        mutated = self._follow(seed, said)
        store = LocalStore.open(root)
        checked = store.verify(blobs_of)
        assert checked.ok, checked.problems
        refs = {(ref.name, ref.tag): str(digest) for ref, digest in store.refs().items()}
        self._settle(seed, said, refs)
        for ref, digest in store.refs().items():
            last = [entry for entry in store.log(ref.name) if entry.ref == ref][-1:]
            if (ref.name, ref.tag) not in self.unlogged:
                assert last[0].new == digest
        trash = {path.name for path in (root / "trash").glob("*/*")}
        assert self.kept <= trash | {digest.hex for digest in store.objects()}
        self.figures["taken over"] += self.lock_was_left and mutated
        self.lock_was_left = (root / "tmp/refs.lock").exists()
        self.figures["locks left"] += self.lock_was_left

    def _follow(self, seed: int, said: list[str]) -> bool:
        """Apply what was acknowledged; whether a name has moved."""
        mutated = False
        outcomes = [line.removeprefix("a ") for line in said if line != "b"]
        for op, outcome in zip(stream(seed), outcomes, strict=False):
            assert outcome in ("done", "refused"), f"{op}: {outcome}"
            goal = states(op, self.refs, self.digests)
            if op.kind != "restore":  # of nothing, it is refused
                assert (goal is not None) == (outcome == "done"), op
            if goal is not None and goal[-1] != self.refs:
                for at in self.refs.keys() | goal[-1].keys():
                    if self.refs.get(at) != goal[-1].get(at):
                        self.unlogged.discard(at)
                self.refs = goal[-1]
                mutated = True
            if op.kind in ("add", "replace") and outcome == "done":
                self.kept |= {text.split(":")[1] for text in self.digests[int(op.words[0])]}
        self.figures["acknowledged"] += len(outcomes)
        return mutated

    def _settle(self, seed: int, said: list[str], refs: Refs) -> None:
        """The operation in flight happened, or did not, or has made some of its moves."""
        allowed: list[Refs] = [self.refs]
        if said[-1:] == ["b"]:
            self.figures["in flight"] += 1
            ops = stream(seed)
            for _ in range((len(said) - 1) // 2):
                next(ops)
            allowed = states(next(ops), self.refs, self.digests) or allowed
        assert refs in allowed
        if refs != self.refs:
            self.figures["done but not acknowledged"] += 1
            self.figures["half done"] += refs != allowed[-1]
            changed = self.refs.keys() | refs.keys()
            self.unlogged |= {at for at in changed if self.refs.get(at) != refs.get(at)}
        self.refs = refs


@pytest.fixture(scope="module")
def nursery() -> Iterator["subprocess.Popen[str]"]:
    """The process that forks workers and kills them."""
    words = [sys.executable, "-m", "tests.store.killed"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def test_killed_workers_lose_nothing(nursery: "subprocess.Popen[str]", tmp_path: Path) -> None:
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    digests = [(one, two) for one, two in json.loads(nursery.stdout.readline())]
    figures: dict[str, int] = dict.fromkeys(FIGURES, 0)
    generator = random.Random(0)
    run, root = Run(digests, figures), tmp_path
    for seed in range(KILLS):
        if seed % GENERATION == 0:
            root = LocalStore.create(tmp_path / str(seed)).root
            run = Run(digests, figures)
        # Each tenth may be killed before it has opened the library.
        order = {"seed": seed, "after": generator.uniform(0, LONGEST), "begun": seed % 10 > 0}
        nursery.stdin.write(json.dumps({"path": str(root), **order}) + "\n")
        nursery.stdin.flush()
        life = json.loads(nursery.stdout.readline())
        figures["kills"] += life["killed"]
        figures["begun"] += bool(life["said"])
        run.after(root, seed, life["said"])
    assert figures["kills"] == KILLS  # none had ended before
    assert figures["begun"] >= KILLS // 2
    assert figures["in flight"] >= KILLS // 10
    assert figures["done but not acknowledged"] >= KILLS // 100
    assert figures["taken over"] >= KILLS // 250
    report("kills", **{name.replace(" ", "_"): value for name, value in figures.items()})
