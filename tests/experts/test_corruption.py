"""Whatever happens to a file of a library, its experts are right or are refused, and derived files
change no answer."""

import json
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from adaptlib.cli.main import invoke

from adaptlib.clustering.mbc import cluster
from adaptlib.clustering.saved import load_clustering, save_clustering
from adaptlib.errors import AdaptlibError, CorruptError, NotFoundError
from adaptlib.experts import Expert, Library
from adaptlib.experts.peft import write_peft
from adaptlib.experts.prototypes import catalogue
from adaptlib.experts.records import load_record
from adaptlib.experts.sketches import sketches
from adaptlib.routing import Arrow
from adaptlib.routing.saved import load_router, save_router
from library_store import Digest, RefCorrupt, StoreError
from tests import tiny
from tests.soak import FACTOR, report
from tests.store.damages import ALL, damaged, remove
from tests.tiny import same_expert

TRIALS = 600 * FACTOR
COMMANDS = 12
REPAIR = "adaptlib verify --repair"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with every kind of object: LoRA, sparse and gated experts, two names of one, an
    expert that only a router knows by now, a pin, a clustering and a router with tensors."""
    root = tmp_path_factory.mktemp("full") / "library"
    library = Library.open(root, create=True)
    for i in range(3):
        library.add(tiny.make_expert(i, task=f"task {i}"), f"e{i}")
    library.add(tiny.make_expert(3, kind="sparse"), "team/few")
    library.tag("e0", "e0:v1")
    library.pin("e1", "kept")
    held = {name: library[name] for name in ("e0", "e1", "e2")}
    save_clustering(library, "mine", cluster(held, k=2))
    save_router(library, "mine", Arrow.fit(held, top_k=2))
    library.remove("e2")
    library.summaries()
    sketches(library)
    catalogue(library)
    return root


def experts() -> dict[str, Expert]:
    """What the names of `full` stand for; none of them mapped from a file that may change."""
    made = {f"e{i}": tiny.make_expert(i, task=f"task {i}") for i in range(2)}
    return made | {"e0:v1": made["e0"], "team/few": tiny.make_expert(3, kind="sparse")}


def reach(library: Library) -> dict[str, set[str]]:
    """The refs that need each object, by digest as hex: worked out here from the plain files."""
    below: dict[str, set[str]] = {}
    for digest in library.store.objects():
        data = library.store.get(digest)
        below[digest.hex] = set()
        if data.startswith(b'{"'):
            document = json.loads(data)
            named = [*document.get("experts", {}).values(), document.get("tensors")]
            named.append(document.get("blob", {}).get("digest"))
            parts = [one for one in named if isinstance(one, str)]
            below[digest.hex] = {one.removeprefix("sha256:") for one in parts}
    needs: dict[str, set[str]] = {one: set() for one in below}
    for ref, digest in library.store.refs().items():
        waiting = [digest.hex]
        while waiting:
            one = waiting.pop()
            needs[one].add(str(ref))
            waiting += below[one]
    return needs


def members(library: Library, clustering: str) -> list[Expert]:
    """The experts of a clustering, which it reads only when it is asked for them."""
    record = load_record(library.store, "clusterings", clustering)
    return [library[digest] for digest in record["experts"].values()]


def readers(library: Library, ref: str) -> list[Callable[[], Any]]:
    """Every way to read what a ref leads to."""
    kind, _, name = ref.partition("/")
    if kind == "clusterings":
        return [lambda: (load_clustering(library, name), *members(library, name))]
    if kind == "routers":
        return [lambda: [*load_router(library, name)[1].values()]]
    if kind == "pins":
        return [lambda: library[library.pins()[name]]]
    return [
        lambda: library[ref],
        lambda: library.stream(ref),
        lambda: write_peft(library.packed(ref), library.path.parent / "never"),  # type: ignore
    ]


def refusal(read: Callable[[], Any]) -> AdaptlibError | StoreError:
    """The error with which a library refuses to be read. The checks of types in tests look into a
    mapping, so they may be the first to meet it."""
    try:
        read()
    except Exception as error:
        found: BaseException | None = error
        while found and not isinstance(found, AdaptlibError | StoreError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return found
    pytest.fail("it was read")


def test_every_damage_is_found_and_no_tensor_is_wrong(full: Path, tmp_path: Path) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)
    library = Library.open(root)
    needs = reach(library)
    whole, names = experts(), list(library.tags())
    assert set(names) == set(whole)
    objects = sorted((root / "objects").rglob("*/*/*"))
    assert len(objects) == len(needs) >= 12
    seen: Counter[str] = Counter()
    asked = 0
    for seed in range(TRIALS):
        rng = random.Random(seed)
        with damaged(objects, rng) as done:
            seen[done.kind] += 1
            hurt = {path.name for path in done.paths}
            found = library.verify()
            refs = {str(ref) for problem in found.problems for ref in problem.refs}
            wanted = set().union(*(needs[one] for one in hurt))
            assert refs == wanted, (seed, done)
            for problem in found.problems:
                assert problem.digest is not None
                assert problem.digest.hex in hurt
                assert (
                    problem.digest.hex in problem.detail or problem.digest.short in problem.detail
                )
                assert problem.hint == REPAIR or problem.hint.startswith("adaptlib "), problem
                assert problem.kind == ("missing" if done.kind == "delete" else "corrupt")
            for ref in wanted:
                error = refusal(rng.choice(readers(library, ref)))
                assert isinstance(error, CorruptError), (seed, done, error)
                assert (error.exit_code, error.hint) == (4, REPAIR)
                assert ref in str(error) or len(hurt) == 2  # its record may be the other
            assert not (tmp_path / "never").exists()
            for name in set(rng.sample(names, 2)) - wanted:
                assert same_expert(library[name], whole[name]), (seed, done)
            if seed < COMMANDS and wanted:
                asked += 1
                assert invoke(["verify", "-L", str(root)]) == 4
                ref = min(wanted)
                if "/" not in ref:
                    assert invoke(["export", ref, str(tmp_path / "out"), "-L", str(root)]) == 4
                    assert not (tmp_path / "out").exists()
    assert library.verify(deep=True).ok
    assert sum(seen.values()) >= 600
    assert set(seen) == {*ALL, "swap"}
    assert asked
    report("damages to objects of a library", trials=sum(seen.values()), **seen)


def test_damage_to_refs_and_logs_gives_no_wrong_expert(full: Path, tmp_path: Path) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)
    library = Library.open(root)
    tags = library.tags()
    whole = experts()
    files = sorted(p for part in ("refs", "log") for p in (root / part).rglob("*") if p.is_file())
    found = silent = 0
    for seed in range(TRIALS // 3):
        rng = random.Random(seed)
        with damaged(files, rng) as done:
            problems = library.verify().problems
            found, silent = found + bool(problems), silent + (not problems)
            is_ref = any("refs" in path.parts for path in done.paths)
            gone = done.kind in ("delete", "directory", "swap")  # as after `rm`, or `tag`
            assert problems or not is_ref or gone, (seed, done)
            assert all(problem.hint.startswith(("adaptlib ", "mv ")) for problem in problems)
            for name, expert in whole.items() if done.kind != "swap" else ():
                # Ref files decide, and a log never does; a ref that is not there is not found.
                with suppress(AdaptlibError, StoreError):
                    assert same_expert(library[name], expert), (seed, done, name)
                    continue
                assert isinstance(refusal(lambda n=name: library[n]), NotFoundError) or problems
    assert library.tags() == tags
    assert found > silent
    report("damages to refs and logs", trials=found + silent, found=found)


def test_a_ref_that_cannot_be_read_hides_no_other(full: Path, tmp_path: Path) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)
    (root / "refs" / "e0" / "latest").write_text("nonsense")
    library = Library.open(root)
    with pytest.raises(RefCorrupt):
        library.tags()  # leaving it out would make gc take what it names
    assert same_expert(library["e1"], tiny.make_expert(1, task="task 1"))
    assert library.repair().report.ok
    assert same_expert(library["e0"], tiny.make_expert(0, task="task 0"))


def test_quick_verify_finds_what_is_missing_or_of_another_size(full: Path, tmp_path: Path) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)
    library = Library.open(root)
    needs = reach(library)
    everything = library.verify()
    quick = library.verify(quick=True)
    assert quick.ok
    assert quick.checked == everything.checked  # each of them has a name
    reads: list[Digest] = []
    view = type(library.store).view

    def noted(self: Any, digest: Digest, *, verify: bool = True) -> memoryview:
        reads.append(digest)
        return view(self, digest, verify=verify)

    kept = (library.store.get(digest) for digest in library.store.objects())
    manifests = (json.loads(data) for data in kept if data.startswith(b'{"'))
    blobs = {Digest.parse(one["blob"]["digest"]) for one in manifests if "blob" in one}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(library.store), "view", noted)
        assert library.verify(quick=True).ok
    assert not blobs & set(reads)  # no weights are read
    for seed in range(60 * FACTOR):
        rng = random.Random(seed)
        paths = [root / "objects" / "sha256" / d[:2] / d for d in needs]
        sizes = {path: path.stat().st_size for path in paths}
        with damaged(paths, rng) as done:
            same = {p for p in done.paths if p.is_file() and not p.is_symlink()}
            same = {p for p in same if p.stat().st_size == sizes[p] and Digest(p.name) in blobs}
            found = {str(r) for p in library.verify(quick=True).problems for r in p.refs}
            # Other weights of the same size are what it does not look for.
            wanted = set().union(*(needs[p.name] for p in done.paths if p not in same))
            assert found == wanted, (seed, done)


# -- what can be made again -----------------------------------------------------------------------


def answers(root: Path) -> dict[str, Any]:
    """What a library says of its experts: listed, clustered, and looked up for routing."""
    library = Library.open(root)
    table = sketches(library)
    index = catalogue(library)
    modules = ("layers.0.proj", "layers.1.proj")
    return {
        "summaries": library.summaries(),
        "tags": library.tags(),
        "sketches": (table.names, table.rows.tobytes(), table.scales.tobytes()),
        "clusters": cluster({name: library[name] for name in library}, k=2).clusters,
        "prototypes": [index.prototypes(m, sorted(library)).numpy().tobytes() for m in modules],
        "prints": [index.pack(n)[0].fingerprints[index.pack(n)[1]] for n in sorted(library)],
    }


@pytest.mark.parametrize("kind", ALL)
def test_damage_to_derived_files_changes_no_answer(full: Path, tmp_path: Path, kind: str) -> None:
    wanted = answers(full)
    segments = sorted(path.relative_to(full) for path in (full / "derived").rglob("*.safetensors"))
    assert len(segments) >= 2
    for seed in range(3 * FACTOR):
        root = tmp_path / str(seed)
        shutil.copytree(full, root)
        for path in segments:
            ALL[kind](root / path, random.Random(seed))
        assert answers(root) == wanted
        assert answers(root) == wanted
        assert Library.open(root).verify(deep=True).ok


def test_each_flipped_bit_of_a_segment_is_noticed(full: Path, tmp_path: Path) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)
    wanted = answers(root)
    paths = sorted((root / "derived").rglob("*.safetensors"))
    rng = random.Random(0)
    for _ in range(20 * FACTOR):
        path = rng.choice(paths)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        remove(path)
        path.write_bytes(data)
        assert answers(root) == wanted
        paths = sorted((root / "derived").rglob("*.safetensors"))


def _wrong_rows(path: Path) -> None:
    """A database that reads well, whose rows have other content or none that can be read."""
    database = sqlite3.connect(path)
    with database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
        for table in [name for name in tables if not name.startswith("sqlite")]:
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            with_suffix = f"UPDATE OR REPLACE {table} SET {columns[-1]} = ?"
            database.execute(with_suffix, [b"\xff no summary"])
    database.close()


def _other_version(path: Path) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute("PRAGMA user_version = 4711")
    database.close()


INDEX: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(9000)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "other version": _other_version,
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "full directory": lambda path: (path.unlink(), path.mkdir(), (path / "x").write_text("x")),
    "symlink": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "read-only": lambda path: (path.write_bytes(b"garbage" * 99), path.chmod(0o444)),
    "wrong rows": _wrong_rows,
}


@pytest.mark.parametrize("kind", INDEX)
def test_a_broken_index_changes_no_list_and_says_nothing(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    root = tmp_path / "library"
    shutil.copytree(full, root)

    def listed() -> tuple[int, str, str]:
        code = invoke(["list", "--json", "-L", str(root)])
        return code, *capsys.readouterr()

    before, summaries = listed(), Library.open(root).summaries()
    assert before[0] == 0
    INDEX[kind](root / "index.db")
    assert listed() == before
    assert listed() == before
    assert Library.open(root).summaries() == summaries
    assert invoke(["show", "e0", "-q", "-L", str(root)]) == 0
    assert capsys.readouterr().err == ""
    assert Library.open(root).verify().ok


def test_flipped_bits_in_the_index_change_no_list(full: Path, tmp_path: Path) -> None:
    """SQLite keeps no checksums, so what is read from it is held against itself."""
    root = tmp_path / "library"
    shutil.copytree(full, root)
    wanted = Library.open(root).summaries()
    data = (root / "index.db").read_bytes()
    written = [i for i, byte in enumerate(data) if byte]
    for seed in range(150 * FACTOR):
        rng = random.Random(seed)
        flipped = bytearray(data)
        flipped[rng.choice(written)] ^= 1 << rng.randrange(8)
        remove(root / "index.db")
        (root / "index.db").write_bytes(flipped)
        assert Library.open(root).summaries() == wanted, seed


def test_the_description_of_a_base_is_checked(tmp_path: Path, save_llama: Any) -> None:
    """A flipped digit of a base's digest would be kept in the card of every expert after it."""
    save_llama(tmp_path / "model")
    root = tmp_path / "library"
    library = Library.open(root, create=True)
    deltas = {"model.layers.0.self_attn.q_proj": tiny.lora(0, d_out=16, d_in=16)}
    expert = Expert(str(tmp_path / "model"), deltas)
    wanted = library.add(expert, "e").digest
    (kept,) = (root / "derived" / "bases").iterdir()
    data = kept.read_bytes()
    for seed in range(4 * FACTOR):
        for kind in ("flip", "flip", "truncate", "fifo" if seed == 0 else "zero page"):
            remove(kept)
            kept.write_bytes(data)
            ALL[kind](kept, random.Random(seed))
            assert library.add(expert, "e").digest == wanted
