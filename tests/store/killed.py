"""Workers that are killed: each performs a seeded stream of operations on a library and says so.

    python -m tests.store.killed       {"path", "seed", "after", "begun"} on stdin, what was said
                                       on stdout; on its first line the digests of the experts

One process imports everything and forks a worker for each line, so that a worker starts in a
millisecond. It is killed with SIGKILL `after` seconds, counted from where it has `begun` if that is
set; what it had written to its pipe by then is all that it has acknowledged. It says "b" when it
begins an operation and "a" with the outcome when that has returned.

An operation is words, as on the command line, so that whoever knows the seed knows what was asked.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptlib.errors import ConflictError, NotFoundError
from adaptlib.experts.codec import Module, Packed
from adaptlib.experts.library import Library
from adaptlib.experts.tensors import RawTensor
from library_store import MemoryStore

NAMES = ("a", "b", "team/c", "team/d")
TAGS = ("latest", "v1", "v2")
EXPERTS = 10
MODULE = "layers.0.proj"


class Op(NamedTuple):
    """One operation and its words."""

    kind: str
    words: tuple[str, ...]


def make_expert(number: int) -> Packed:
    """A small expert; each number another one."""
    generator = np.random.default_rng(number)

    def raw(*shape: int) -> RawTensor:
        data = generator.standard_normal(shape).astype("<f4")
        return RawTensor("F32", shape, memoryview(data.tobytes()))

    size = 64 + 32 * number  # objects of several sizes
    tensors = {f"{MODULE}.lora_a": raw(2, size), f"{MODULE}.lora_b": raw(size, 2)}
    module = Module((size, size), rank=2, scale=1.0)
    return Packed("lora", "org/base", {MODULE: module}, tensors, {"task": f"task {number}"})


def stream(seed: int) -> Iterator[Op]:
    """Operations without end, the same ones for the same seed."""
    generator = random.Random(seed)

    def some(*, tagged: bool = True) -> str:
        name, tag = generator.choice(NAMES), generator.choice(TAGS)
        return name if tag == "latest" or not tagged else f"{name}:{tag}"

    while True:
        kind = generator.choices(
            ("add", "replace", "tag", "retag", "rm", "mv", "gc", "restore"),
            weights=(6, 5, 4, 4, 4, 4, 2, 1),
        )[0]
        if kind in ("add", "replace"):
            yield Op(kind, (str(generator.randrange(EXPERTS)), some()))
        elif kind in ("tag", "retag"):
            yield Op(kind, (some(), some()))
        elif kind == "rm":
            yield Op(kind, (some(),))
        elif kind == "mv":
            whole = generator.random() < 0.6
            yield Op(kind, (some(tagged=not whole), some(tagged=not whole)))
        else:
            yield Op(kind, (str(generator.randrange(1 << 30)),))


def perform(library: Library, op: Op) -> str:
    """Do it; "done", or "refused" where the library says that it cannot be meant."""
    try:
        if op.kind in ("add", "replace"):
            number, name = op.words
            library.add(make_expert(int(number)), name, replace=op.kind == "replace")
        elif op.kind in ("tag", "retag"):
            library.tag(*op.words, replace=op.kind == "retag")
        elif op.kind == "rm":
            library.remove(*op.words)
        elif op.kind == "mv":
            library.rename(*op.words)
        elif op.kind == "gc":
            library.gc(grace=timedelta(0), history=timedelta(0), allow_empty=True)
        else:
            assert library.path is not None
            trash = sorted(path.name for path in (library.path / "trash").iterdir())
            library.restore(trash[int(op.words[0]) % len(trash)] if trash else "none")
    except (ConflictError, NotFoundError):
        return "refused"
    return "done"


def work(path: Path, seed: int, pipe: int) -> None:
    """A worker's life, which ends from outside."""
    library = Library.open(path)
    for op in stream(seed):
        os.write(pipe, b"b\n")
        try:
            outcome = perform(library, op)
        except Exception as error:  # which no operation here may raise
            os.write(pipe, f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
            return
        os.write(pipe, b"a %s\n" % outcome.encode())


def one_life(path: Path, *, seed: int, after: float, begun: bool) -> dict[str, Any]:
    """Fork a worker, kill it, and tell what it said."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            work(path, seed, writing)
        finally:
            os._exit(1)
    os.close(writing)
    said = os.read(reading, 1 << 16) if begun else b""
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    while piece := os.read(reading, 1 << 16):
        said += piece
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"said": said.decode().splitlines(), "killed": killed}


def main() -> None:
    """See above."""
    os.fsync = lambda fd: None  # whatever a killed process wrote is there: the system lives on
    memory = Library(MemoryStore())
    added = [memory.add(make_expert(number), f"e{number}") for number in range(EXPERTS)]
    print(json.dumps([(one.digest, one.manifest.blob.digest) for one in added]), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(one_life(Path(order.pop("path")), **order)), flush=True)


if __name__ == "__main__":
    main()
