"""The index of prototypes: exact, never stale, made again where broken, and cheap to extend."""

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts import Expert, Library, LoRADelta, prototypes, segments
from adaptlib.experts.prototypes import Catalogue, catalogue, directions, signs, sketch
from adaptlib.experts.segments import (
    RECIPE,
    SIZE,
    Segment,
    compact,
    forget_rows,
    merged,
    read_segments,
    write_segment,
)
from tests.tiny import make_expert, same_tensor


def wide(seed: int, **modules: int) -> Expert:
    """An expert with modules of these d_in."""
    generator = torch.Generator().manual_seed(seed)
    return Expert(
        "org/base",
        {
            name: LoRADelta(
                torch.randn(3, d_in, generator=generator), torch.randn(6, 3, generator=generator)
            )
            for name, d_in in modules.items()
        },
    )


def fill(library: Library) -> dict[str, Expert]:
    """Both kinds, three signatures."""
    held: dict[str, Expert] = {f"e{i}": make_expert(i) for i in range(4)}
    held |= {f"s{i}": make_expert(i, kind="sparse") for i in range(2)}
    held |= {f"w{i}": wide(i, a=40, b=200) for i in range(3)}
    held["other"] = wide(9, b=200)
    for name, expert in held.items():
        library.add(expert, name)
    return held


def exact(found: Catalogue, held: dict[str, Expert]) -> None:
    """Every prototype is that of the expert, to the last bit, and every sketch is of it."""
    assert set(found.names) == set(held)
    assert sorted(name for pack in found.packs for name in pack.names) == sorted(held)
    for name, expert in held.items():
        pack, place = found.pack(name)
        assert dict(pack.shapes) == expert.shapes
        assert pack.fingerprints[place] == expert.fingerprint
        for module, delta in expert.deltas.items():
            assert same_tensor(found.prototypes(module, [name])[0], delta.top_direction())
        row = torch.cat([delta.top_direction() for delta in expert.deltas.values()])
        sketches = torch.cat(pack.sketches, dim=1)[:, place]
        assert torch.allclose(sketches, sketch(pack.shapes, row[None])[:, 0], atol=1e-5)


def files(library: Library) -> list[Path]:
    assert library.path is not None
    return sorted((library.path / "derived" / "prototypes").glob("*/*"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the experts that were read."""
    names: list[str] = []
    read = prototypes.read_packed

    def counting(library: Library, digest: str, name: str) -> Any:
        names.append(name)
        return read(library, digest, name)

    monkeypatch.setattr(prototypes, "read_packed", counting)
    return names


# -- what it says ---------------------------------------------------------------------------------


def test_it_holds_what_the_experts_hold(library: Library) -> None:
    held = fill(library)
    for _ in range(2):
        found = catalogue(library)
        assert found.names == tuple(library)
        assert dict(found.digests) == library.names()
        exact(found, held)
    assert len(found.packs) == 3
    some = catalogue(library, ["w2", "e1", "w0"])
    assert some.names == ("w2", "e1", "w0")
    exact(some, {name: held[name] for name in some.names})


def test_rows_come_in_the_order_asked(library: Library) -> None:
    held = fill(library)
    found = catalogue(library)
    for names in (["w1", "w0", "w2"], ["w2", "other", "w0", "w2"], ["other"]):
        wanted = torch.stack([held[name].deltas["b"].top_direction() for name in names])
        assert torch.equal(found.prototypes("b", names), wanted)
    (pack,) = [pack for pack in found.packs if "w0" in pack.names]
    rows = pack.prototypes(torch.tensor([2, 0, 2]))
    assert rows.shape == (3, 240)
    assert torch.equal(rows[:, :40], pack.prototypes(torch.tensor([2, 0, 2]), "a"))
    assert torch.equal(rows[:, 40:], pack.prototypes(torch.tensor([2, 0, 2]), "b"))


def test_what_it_does_not_hold(library: Library) -> None:
    with pytest.raises(UsageError, match="one expert at least"):
        catalogue(library)
    fill(library)
    found = catalogue(library)
    with pytest.raises(NotFoundError, match=r"no expert named 'w11'.*did you mean w"):
        found.prototypes("b", ["w11"])
    with pytest.raises(NotFoundError, match="e1 has no module b"):
        found.prototypes("b", ["w1", "e1"])
    with pytest.raises(UsageError, match="no experts"):
        found.prototypes("b", [])
    with pytest.raises(NotFoundError, match="no expert named 'nobody'"):
        catalogue(library, ["nobody"])
    library.add(wide(1, b=50), "narrow")
    with pytest.raises(UsageError, match="b takes 50 and 200 numbers"):
        catalogue(library).prototypes("b", ["w1", "narrow"])


def test_two_names_of_one_expert(library: Library) -> None:
    held = fill(library)
    library.tag("w1", "again")
    library.tag("w1", "again:v2")
    found = catalogue(library, ["again", "w0", "w1", "w1:latest"])
    exact(found, {"again": held["w1"], "w0": held["w0"], "w1": held["w1"], "w1:latest": held["w1"]})


def test_an_update_of_zero_has_no_direction(library: Library) -> None:
    library.add(Expert("org/base", {"m": LoRADelta(torch.ones(1, 4), torch.zeros(3, 1))}), "zero")
    found = catalogue(library)
    assert not found.prototypes("m", ["zero"]).any()
    assert not found.packs[0].sketches[0].any()


def test_sketches_keep_inner_products() -> None:
    shapes = {"narrow": (5, 100), "one": (5, 600), "two": (5, 600)}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 1300, generator=generator)
    parts = [torch.nn.functional.normalize(p, dim=1) for p in rows.split([100, 600, 600], dim=1)]
    small = sketch(shapes, torch.cat(parts, dim=1))
    errors = [s @ s.T - p @ p.T for s, p in zip(small, parts, strict=True)]
    assert errors[0].abs().max() < 1e-5  # nothing is lost where all directions are kept
    for error in errors[1:]:
        assert error.abs().max() < 5 / SIZE**0.5
        assert error.square().mean().sqrt() < 1 / SIZE**0.5
        assert abs(float(error.mean())) < 0.01
    same = torch.cat([torch.zeros(60, 100), parts[1], parts[1]], dim=1)
    _, one, two = sketch(shapes, same)
    off = [(s @ s.T - parts[1] @ parts[1].T).triu(1).flatten() for s in (one, two)]
    assert abs(float(torch.corrcoef(torch.stack(off))[0, 1])) < 0.1  # other signs, other errors


def test_sketches_are_the_same_everywhere() -> None:
    """An index may be read by another machine than the one that wrote it."""
    assert signs("model.layers.0.self_attn.q_proj", 8).tolist() == [-1, -1, 1, -1, -1, 1, 1, 1]
    found = directions(200)
    assert torch.allclose(found.T @ found, torch.eye(SIZE) * 200 / SIZE, atol=1e-4)
    assert [round(v, 4) for v in found[0, :3].tolist()] == [0.1444, -0.0099, -0.048]
    assert torch.equal(directions(3), torch.eye(3, SIZE))


# -- what it costs --------------------------------------------------------------------------------


def test_only_new_experts_are_read(local: Library, reads: list[str]) -> None:
    held = fill(local)
    progress: list[tuple[int, int]] = []
    catalogue(local, progress=lambda done, of: progress.append((done, of)))
    assert sorted(reads) == sorted(held)
    assert progress == [(i, len(held)) for i in range(1, len(held) + 1)]
    reads.clear()
    exact(catalogue(local), held)
    assert reads == []
    states = {path: path.stat().st_mtime_ns for path in files(local)}
    held["e4"] = make_expert(4)
    local.add(held["e4"], "e4")
    exact(catalogue(local), held)
    assert reads == ["e4"]
    assert {path: path.stat().st_mtime_ns for path in states} == states
    assert len(files(local)) == len(states) + 1  # one small segment more
    local.add(make_expert(11), "e0", replace=True)
    held["e0"] = make_expert(11)
    exact(catalogue(local), held)
    assert reads == ["e4", "e0"]
    assert "e0" in catalogue(local).names


def test_a_renamed_expert_is_not_read_again(local: Library, reads: list[str]) -> None:
    held = fill(local)
    catalogue(local)
    reads.clear()
    local.rename("w0", "v0")
    held["v0"] = held.pop("w0")
    exact(catalogue(local), held)
    assert reads == []


def test_segments_are_merged_as_they_come(
    local: Library, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Expert] = {}
    written: list[int] = []
    write = segments.write_segment

    def counting(root: Path, shapes: Any, segment: Segment) -> Segment:
        written.append(len(segment))
        return write(root, shapes, segment)

    monkeypatch.setattr(segments, "write_segment", counting)  # merges alone call it by this name
    for i in range(40):
        held[f"w{i}"] = wide(i, a=9)
        local.add(held[f"w{i}"], f"w{i}")
        found = catalogue(local)
        (pack,) = found.packs
        sizes = sorted(len(table) for table in pack.tables)
        assert sum(sizes) == i + 1
        assert len(sizes) <= math.log2(i + 1) + 1
        assert all(size > sum(sizes[:k]) for k, size in enumerate(sizes))
        assert len(files(local)) == len(sizes)
    exact(found, held)
    assert reads == list(held)
    assert sum(written) <= 40 * math.log2(40)


def test_which_segments_are_merged() -> None:
    for sizes, count in (
        ([], 0),
        ([5], 0),
        ([1, 1], 2),
        ([1, 2], 0),
        ([1, 2, 4], 0),
        ([1, 1, 2], 3),
        ([1, 1, 3, 100], 2),
        ([1, 2, 3, 100], 3),
        ([4, 9, 20, 30, 100], 4),
    ):
        assert merged(sizes) == count


def test_full_segments_are_left_alone(local: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 * 9 + 4 * SIZE + 64
    monkeypatch.setattr(segments, "FULL", 4 * row)
    monkeypatch.setattr(prototypes, "FULL", 4 * 4 * 9)  # which counts prototypes alone
    held = {f"w{i}": wide(i, a=9) for i in range(18)}
    for name, expert in held.items():
        local.add(expert, name)
    found = catalogue(local)
    exact(found, held)
    assert sorted(len(table) for table in found.packs[0].tables) == [2, 4, 4, 4, 4]
    for i in range(18, 30):
        held[f"w{i}"] = wide(i, a=9)
        local.add(held[f"w{i}"], f"w{i}")
        found = catalogue(local)
    exact(found, held)
    sizes = sorted(len(table) for table in found.packs[0].tables)
    assert sum(sizes) == 30
    assert max(sizes) <= 8


# -- what can happen to it ------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    """As after a crash, where the length reached the disk and the end did not."""
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other_place(path: Path) -> None:
    path.rename(path.with_name("0" * 32 + ".safetensors"))


def other_folder(path: Path) -> None:
    folder = path.parent.with_name(f"{RECIPE}-{'0' * 32}")
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)


def other_recipe(path: Path) -> None:
    path.parent.rename(path.parent.with_name(path.parent.name.replace(f"{RECIPE}-", "0-")))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        half,
        zeros,
        directory,
        pipe,
        other_place,
        other_folder,
        other_recipe,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 1000),
        lambda path: path.unlink(),
        lambda path: shutil.rmtree(path.parent),
        lambda path: shutil.rmtree(path.parents[2]),
    ],
)
def test_what_is_broken_is_as_if_it_were_not_there(
    local: Library, reads: list[str], damage: Callable[[Path], Any]
) -> None:
    held = fill(local)
    catalogue(local)
    reads.clear()
    (path,) = [path for path in files(local) if path.parent.name == files(local)[0].parent.name]
    damage(path)
    exact(catalogue(local), held)
    assert reads
    if path.is_dir():  # in the place of the file, which so cannot be written
        return
    reads.clear()
    exact(catalogue(local), held)
    assert reads == []


def test_what_was_done_before_a_stop_is_not_done_again(local: Library, reads: list[str]) -> None:
    held = fill(local)

    def stop(done: int, of: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalogue(local, progress=stop)
    assert len(reads) == 6
    exact(catalogue(local), held)
    assert sorted(reads) == sorted(held)


@pytest.mark.parametrize("call", ["fsync", "mkdir", "replace"])
def test_a_library_that_cannot_be_written(
    local: Library, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    held = fill(local)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, refuse)
    exact(catalogue(local), held)
    monkeypatch.undo()
    assert files(local) == []
    exact(catalogue(local), held)
    assert len(files(local)) == 3


def test_a_merge_that_cannot_be_written_loses_nothing(
    local: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.add(wide(0, a=9), "w0")
    catalogue(local)
    local.add(wide(1, a=9), "w1")
    write, calls = segments.write_segment, []

    def once(root: Path, shapes: Any, segment: Segment) -> Segment:
        calls.append(len(segment))
        return write(root, shapes, segment) if len(segment) == 1 else segment

    monkeypatch.setattr(segments, "write_segment", once)
    exact(catalogue(local), {"w0": wide(0, a=9), "w1": wide(1, a=9)})
    assert calls == [2]
    assert len(files(local)) == 2


def test_many_at_once(local: Library) -> None:
    """Libraries of their own, as in other processes, share nothing but the files."""
    held = {f"w{i}": wide(i, a=9, b=150) for i in range(12)}
    for name, expert in list(held.items())[:6]:
        local.add(expert, name)

    def work(i: int) -> Catalogue:
        library = Library.open(local.path)
        if i < 6:
            library.add(held[f"w{6 + i}"], f"w{6 + i}")
        return catalogue(library)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(12)))
    for one in found:
        exact(one, {name: held[name] for name in one.names})
    exact(catalogue(local), held)
    assert not [path for path in files(local) if path.suffix != ".safetensors"]


def test_a_segment_that_another_process_has_just_merged(
    local: Library, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    held = {f"w{i}": wide(i, a=9) for i in range(3)}
    for name in ("w0", "w1", "w2"):
        local.add(held[name], name)
        catalogue(local, ["w0"] if name == "w0" else [name])
    reads.clear()
    read, merging = segments._read, [True]

    def late(path: Path, form: Any) -> Any:
        if merging.pop() if merging else False:  # after the folder was listed
            root = path.parents[1]
            ((shapes, parts),) = read_segments(root)
            whole = segments._join(parts, {d for p in parts for d in p.names()})
            write_segment(root, shapes, whole)
            for part in parts:
                assert part.path is not None
                part.path.unlink()
        return read(path, form)

    monkeypatch.setattr(segments, "_read", late)
    exact(catalogue(local), held)
    assert reads == []


def test_a_digest_in_two_segments_is_one_expert(local: Library) -> None:
    held = {f"w{i}": wide(i, a=9) for i in range(3)}
    for name, expert in held.items():
        local.add(expert, name)
    catalogue(local)
    assert local.path is not None
    root = local.path / "derived" / "prototypes"
    ((shapes, (whole,)),) = read_segments(root)
    part = segments._join([whole], set(whole.names()[:2]))
    parts = [whole, write_segment(root, shapes, part)]
    assert len(files(local)) == 2
    exact(catalogue(local), held)
    after = compact(root, shapes, [*parts, write_segment(root, shapes, part)], whole.names)
    assert sum(len(s) for s in after) in (3, 5)
    exact(catalogue(local), held)


# -- giving back ----------------------------------------------------------------------------------


def rows(library: Library) -> int:
    assert library.path is not None
    found = read_segments(library.path / "derived" / "prototypes")
    return sum(len(segment) for _, parts in found for segment in parts)


def test_forgetting_what_no_name_leads_to(local: Library, reads: list[str]) -> None:
    held = fill(local)
    catalogue(local)
    assert local.path is not None
    assert forget_rows(local.path, local.tags().values()) == (0, 0)
    for name in ("other", "w0", "e0", "e1", "e2"):
        local.remove(name)
        del held[name]
    kept = local.tags().values()
    size = sum(path.stat().st_size for path in files(local))
    count, freed = forget_rows(local.path, kept, dry_run=True)
    assert count == 4  # not w0: most of its file is in use
    assert (rows(local), len(files(local))) == (10, 3)
    assert forget_rows(local.path, kept) == (count, freed)
    assert rows(local) == 6
    assert len(files(local)) == 2
    assert 0 < freed <= size - sum(path.stat().st_size for path in files(local))
    reads.clear()
    exact(catalogue(local), held)
    assert reads == []


def test_forgetting_what_cannot_be_used(local: Library) -> None:
    held = fill(local)
    catalogue(local)
    assert local.path is not None
    kept, (first, *_) = local.tags().values(), files(local)
    old, young = (first.with_name(f".{n}.partial") for n in ("old", "young"))
    for path in (old, young, first.with_name("broken.safetensors")):
        path.write_bytes(b"x" * 50)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    folder = first.parent.with_name("0-" + "f" * 32)
    shutil.copytree(first.parent, folder)
    assert forget_rows(local.path, kept, dry_run=True)[1] > 150
    assert old.exists()
    assert forget_rows(local.path, kept)[0] == 0
    assert not old.exists()
    assert young.exists()
    assert not first.with_name("broken.safetensors").exists()
    assert [path.name for path in folder.glob("*")] in ([], ["." + "young.partial"])
    exact(catalogue(local), held)
    shutil.rmtree(local.path / "derived")
    assert forget_rows(local.path, kept) == (0, 0)


def test_merging_drops_what_no_name_leads_to(local: Library) -> None:
    for i in range(2):
        local.add(wide(i, a=9), f"w{i}")
    catalogue(local)
    local.remove("w0")
    for i in (2, 3):
        local.add(wide(i, a=9), f"w{i}")
    exact(catalogue(local), {f"w{i}": wide(i, a=9) for i in (1, 2, 3)})
    assert rows(local) == 3


def test_upkeep_does_not_wait_for_torch() -> None:
    code = "import sys, adaptlib.experts.segments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
