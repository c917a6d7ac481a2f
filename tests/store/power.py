"""What a power cut may leave on a simulated disk: every state that POSIX allows, and which it was.

Durable is what was synced: the bytes and the time of a file by an `fsync` of that file, the entries
of a directory by an `fsync` of that directory. Everything else is kept or lost piece by piece:

entries     Of each name in a directory, what it was at the last sync or what any change since has
            made it, whatever becomes of other names, in this directory or another one. A rename
            is two changes, of the old name and of the new one: both, either or neither may be
            there. A name that a rename replaced is the old file or the new one and never absent,
            since no single change made it absent. A directory whose own entry is lost takes all
            below it along, synced or not.
bytes       Old, new, or between: of any length between the two (at some cuts), with each sector
            of 512 bytes old or new, in any order, and zeros where a sector never got to the disk.
            A sector is written wholly or not at all. What a file never held is never in it.
times       Of `utime`: old or new.

ext4, xfs and btrfs allow less. They write entries in the order in which they were made and a rename
as one transaction, so of several changes only the first few can survive; and an `fsync` of a new
file makes its name durable too. ext4 (`data=ordered`) and btrfs never show zeros for bytes that a
file's length covers; xfs does, where a later part of the file was on the disk before an earlier
one. A program that is right under these rules is right on all three.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice, product
from typing import Any, Final, TypeAlias

from tests.store.image import ROOT, Image

SECTOR: Final = 512

Fact: TypeAlias = tuple[Any, ...]
"""What may be one of several: ("entry", directory, name), ("bytes", inode) or ("time", inode)."""
Choice: TypeAlias = dict[Fact, Any]


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment at which the power may go, and what each fact may then be, the durable one first.

    `done` operations had returned. `fresh` are the facts that the last change gave new answers to,
    with those: only a state with one of them was not possible a moment ago. None: all are new.
    """

    done: int
    after: str
    durable: Image
    answers: dict[Fact, tuple[Any, ...]]
    fresh: dict[Fact, tuple[Any, ...]] | None


class Recorder:
    """A journal of what was changed and synced, and the moments between."""

    def __init__(self, image: Image, *, cuts: int, done: int = 0) -> None:
        self.moments: list[Moment] = []
        self._cuts = cuts
        self._directories = dict(image.directories)
        self._files = dict(image.files)
        self._answers: dict[Fact, tuple[Any, ...]] = {}
        self._writes: dict[int, tuple[bytes, ...]] = {}
        self._fresh: dict[Fact, tuple[Any, ...]] = {}
        self._last = "the start"
        self.returned(done)

    def entry(self, directory: int, name: str, child: int | None) -> None:
        fact = ("entry", directory, name)
        known = self._answers.get(fact) or (self._directories[directory].get(name),)
        self._answer(fact, (*(one for one in known if one != child), child))

    def made(self, inode: int, mtime: int | None) -> None:
        if mtime is None:
            self._directories[inode] = {}
        else:
            self._files[inode] = (b"", mtime)

    def wrote(self, inode: int, data: bytes, mtime: int) -> None:
        writes = (*(self._writes.get(inode) or (self._files[inode][0],)), data)
        self._writes[inode] = writes
        self._answer(("bytes", inode), between(writes, self._cuts))
        if self._answers.pop(("time", inode), None) or not self._files[inode][0]:
            self._files[inode] = (self._files[inode][0], mtime)  # its bytes tell it apart

    def touched(self, inode: int, mtime: int) -> None:
        known = self._answers.get(("time", inode)) or (self._files[inode][1],)
        self._answer(("time", inode), (*known, mtime))

    def synced(self, inode: int) -> None:
        if inode in self._directories:
            entries = dict(self._directories[inode])
            for fact in [f for f in self._answers if f[0] == "entry" and f[1] == inode]:
                child = self._answers.pop(fact)[-1]
                if child is None:
                    entries.pop(fact[2], None)
                else:
                    entries[fact[2]] = child
            self._directories[inode] = entries
            return
        data, mtime = self._files[inode]
        data = self._answers.pop(("bytes", inode), (data,))[-1]
        mtime = self._answers.pop(("time", inode), (mtime,))[-1]
        self._writes.pop(inode, None)
        self._files[inode] = (data, mtime)

    def changed(self, call: str) -> None:
        self._last = call
        if self._fresh:
            self._moment(self._fresh)
            self._fresh = {}

    def returned(self, done: int) -> None:
        """An operation has returned: what is promised now is promised of every state."""
        self.done = done
        self._fresh = {}
        self._moment(None)

    def _answer(self, fact: Fact, answers: tuple[Any, ...]) -> None:
        known = self._answers.get(fact) or answers[:1]
        self._answers[fact] = answers
        if new := tuple(one for one in answers if one not in known):
            self._fresh[fact] = new

    def _moment(self, fresh: dict[Fact, tuple[Any, ...]] | None) -> None:
        durable = Image(dict(self._directories), dict(self._files))
        answers = dict(self._answers)
        self.moments.append(Moment(self.done, self._last, durable, answers, fresh))


@lru_cache(maxsize=4096)
def between(writes: tuple[bytes, ...], cuts: int) -> tuple[bytes, ...]:
    """What a file may hold that held these one after the other; the first was synced.

    Of any two of these some sectors may be of the one and some of the other: 2 ** 3 sets of them at
    most, at `cuts` lengths between theirs.
    """
    found = dict.fromkeys(writes[:1])
    for old, new in combinations(writes, 2):
        low, high = sorted((len(old), len(new)))
        lengths = {low + (high - low) * cut // (cuts + 1) for cut in range(1, cuts + 1)}
        for size in sorted({*lengths, *({high - 1} if high else ()), high, low}):
            found.update(dict.fromkeys(_sectors(old, new, size)))
    del found[writes[-1]]
    return (*found, writes[-1])


def _sectors(old: bytes, new: bytes, size: int) -> Iterator[bytes]:
    """`size` bytes whose sectors are old or new; a byte that there never was is zero."""
    before, after = old[:size].ljust(size, b"\0"), new[:size].ljust(size, b"\0")
    starts = range(0, size, SECTOR)
    pairs = [(before[i : i + SECTOR], after[i : i + SECTOR]) for i in starts]
    options = [dict.fromkeys(pair) for pair in pairs]
    if sum(len(one) > 1 for one in options) <= 3:
        yield from map(b"".join, product(*options))
        return
    for i, (was, is_) in enumerate(pairs):  # each alone, and all but each
        yield b"".join(pair[0] if i != j else is_ for j, pair in enumerate(pairs))
        yield b"".join(pair[1] if i != j else was for j, pair in enumerate(pairs))
    yield before
    yield after


# --- the states of a moment ---------------------------------------------------------------------


def states(moment: Moment, *, cap: int, seed: int) -> Iterator[Image]:
    """Every state that a power cut at this moment may leave, if there are `cap` at most.

    If there are more, `cap` of them or a few more: nothing survives, all does, each change alone,
    all but each; then, as far as `cap` goes, each other answer to a fact alone and with all else;
    then some at random.
    """
    if moment.fresh is None:
        yield from _some(moment, {}, cap, seed)
        return
    for fact, answers in moment.fresh.items():
        for choice in _choices(moment, {fact: answers}, cap, seed):
            if fact in choice:
                yield _image(moment, choice)


def _some(moment: Moment, fixed: Choice, cap: int, seed: int) -> Iterator[Image]:
    for choice in _choices(moment, fixed, cap, seed):
        yield _image(moment, choice)


def _choices(moment: Moment, fixed: Choice, cap: int, seed: int) -> Iterator[Choice]:
    walk = _Walk(moment, fixed)
    all_ = list(islice(walk.all(), cap + 1))
    if len(all_) <= cap:
        yield from all_
        return
    facts = {**fixed, **{fact: walk.answers(fact) for fact in moment.answers}}
    singles = [(fact, answers[which], -1 - which) for fact, answers in facts.items()
               for which in (-1, 0)]  # fmt: skip
    singles += [(fact, answer, rest) for fact, answers in facts.items()
                for answer in answers[1:-1] for rest in (0, -1)]  # fmt: skip
    yield walk.one(lambda fact, answers: answers[0])
    yield walk.one(lambda fact, answers: answers[-1])
    for one, answer, rest in singles[: max(2 * len(facts), cap - 2)]:
        yield walk.one(
            lambda fact, answers, one=one, answer=answer, rest=rest: (
                answer if fact == one else answers[rest]
            )
        )
    generator = random.Random(seed)
    for _ in range(cap - 2 - len(singles)):
        yield walk.one(lambda fact, answers: generator.choice(answers))


class _Walk:
    """From the root down: a fact matters only if what was chosen before leads to it."""

    def __init__(self, moment: Moment, fixed: Choice) -> None:
        self._moment = moment
        self._fixed = fixed
        self._below: dict[int, list[Fact]] = {}
        self._open: dict[int, list[tuple[Any, ...]]] = {}
        for fact in moment.answers:
            if fact[0] == "entry":
                self._open.setdefault(fact[1], []).append(fact)

    def all(self) -> Iterator[Choice]:
        """Every choice, each once."""
        agenda = list(self._facts(ROOT))
        choice: Choice = {}
        taken: list[tuple[tuple[Any, ...], int, int]] = []  # (answers, which, agenda before)
        while True:
            while len(taken) < len(agenda):
                answers = self.answers(agenda[len(taken)])
                taken.append((answers, 0, len(agenda)))
                self._take(agenda[len(taken) - 1], answers[0], agenda, choice)
            yield dict(choice)
            while taken:
                answers, which, size = taken.pop()
                del agenda[size:]
                fact = agenda[len(taken)]
                if which + 1 < len(answers):
                    taken.append((answers, which + 1, size))
                    self._take(fact, answers[which + 1], agenda, choice)
                    break
                del choice[fact]
            else:
                return

    def one(self, choose: Callable[[Fact, tuple[Any, ...]], Any]) -> Choice:
        """The choice that `choose` makes, fact by fact."""
        agenda = list(self._facts(ROOT))
        choice: Choice = {}
        for fact in agenda:
            self._take(fact, choose(fact, self.answers(fact)), agenda, choice)
        return choice

    def answers(self, fact: Fact) -> tuple[Any, ...]:
        return self._fixed.get(fact) or self._moment.answers[fact]

    def _take(self, fact: Fact, answer: Any, agenda: list[Fact], choice: Choice) -> None:
        choice[fact] = answer
        if fact[0] == "entry" and answer is not None:
            agenda += [one for one in self._facts(answer) if one not in agenda]

    def _facts(self, inode: int) -> list[Fact]:
        """What is open at an inode and below it, as far as what is certain leads."""
        if inode in self._below:
            return self._below[inode]
        moment = self._moment
        entries = moment.durable.directories.get(inode)
        if entries is None:
            facts = [f for f in (("bytes", inode), ("time", inode)) if f in moment.answers]
        else:
            facts = list(self._open.get(inode, ()))
            uncertain = {fact[2] for fact in facts}
            for name, child in entries.items():
                if name not in uncertain:
                    facts += self._facts(child)
        facts = list(dict.fromkeys(facts))  # a file of two names is met twice
        self._below[inode] = facts
        return facts


def _image(moment: Moment, choice: Choice) -> Image:
    directories = dict(moment.durable.directories)
    files = dict(moment.durable.files)
    changed: set[int] = set()
    for fact, answer in choice.items():
        inode = fact[1]
        if fact[0] == "bytes":
            files[inode] = (answer, files[inode][1])
        elif fact[0] == "time":
            files[inode] = (files[inode][0], answer)
        else:
            if inode not in changed:
                directories[inode] = dict(directories[inode])
                changed.add(inode)
            if answer is None:
                directories[inode].pop(fact[2], None)
            else:
                directories[inode][fact[2]] = answer
    return Image(directories, files)
