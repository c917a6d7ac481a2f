"""Sketches kept in a library: those of its experts, made once, and nothing rests on them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptlib.errors import BaseMismatchError, NotFoundError, RefusedError, UsageError
from adaptlib.experts import Expert, Library, LoRADelta, sketches
from adaptlib.experts.codec import pack
from adaptlib.experts.projection import module_seed
from adaptlib.experts.segments import forget_rows
from adaptlib.experts.sketches import LOOSE, SIDE, SKETCHES, SketchTable, sketch_expert
from tests.tiny import make_expert


def wide(seed: int, dtype: torch.dtype = torch.float32, **modules: int) -> Expert:
    """An expert with modules of these d_in."""
    generator = torch.Generator().manual_seed(seed)
    return Expert(
        "org/base",
        {
            name: LoRADelta(
                torch.randn(3, d_in, generator=generator).to(dtype),
                torch.randn(6, 3, generator=generator).to(dtype),
            )
            for name, d_in in modules.items()
        },
    )


def fill(library: Library) -> dict[str, Expert]:
    """Both kinds, three signatures."""
    held: dict[str, Expert] = {f"e{i}": make_expert(i) for i in range(3)}
    held |= {f"s{i}": make_expert(i, kind="sparse") for i in range(2)}
    held |= {f"w{i}": wide(i, a=40, b=200) for i in range(3)}
    held["other"] = wide(9, b=200)
    for name, expert in held.items():
        library.add(expert, name)
    return held


def exact(found: SketchTable, held: dict[str, Expert]) -> None:
    """Every row is the sketch of the expert's updates, but for float16, and zeros elsewhere."""
    assert found.names == tuple(sorted(held))
    modules = sorted({module for expert in held.values() for module in expert.deltas})
    assert found.modules == tuple(modules)
    for name, row, scale in zip(found.names, found.rows, found.scales, strict=True):
        blocks = row.astype(np.float32).reshape(len(modules), -1) * scale
        for module, block in zip(modules, blocks, strict=True):
            delta = held[name].deltas.get(module)
            if delta is None:
                assert not block.any()
                continue
            wanted = delta.sketch(seed=module_seed(0, module), size=SIDE).reshape(-1).numpy()
            assert np.allclose(block, wanted, atol=1e-3 * scale)


def files(library: Library) -> list[Path]:
    assert library.path is not None
    return sorted((library.path / "derived" / "sketches").glob("*/*"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each sketch that is made."""
    calls: list[int] = []
    make = sketches.sketch_expert

    def counting(packed: Any, **options: Any) -> Any:
        calls.append(1)
        return make(packed, **options)

    monkeypatch.setattr(sketches, "sketch_expert", counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_raw_bytes_and_tensors_have_one_sketch(dtype: torch.dtype) -> None:
    for expert in (wide(0, dtype, a=9, b=300), make_expert(3, kind="sparse")):
        row = sketch_expert(pack(expert), seed=5, side=4).reshape(-1, 4, 4)
        for found, (module, delta) in zip(row, expert.deltas.items(), strict=True):
            wanted = delta.sketch(seed=module_seed(5, module), size=4).numpy()
            assert np.array_equal(found, wanted)


def test_it_holds_what_the_experts_hold(library: Library) -> None:
    held = fill(library)
    for _ in range(2):
        exact(sketches.sketches(library), held)
    some = ["w2", "e1", "w0"]
    exact(sketches.sketches(library, some), {name: held[name] for name in some})
    library.tag("w1", "again")
    twice = sketches.sketches(library, ["w1", "again"])
    assert np.array_equal(twice.rows[0], twice.rows[1])


def test_they_are_made_when_an_expert_is_added(local: Library, made: list[int]) -> None:
    held = fill(local)
    assert len(made) == len(files(local)) == len(held)
    exact(sketches.sketches(local), held)
    count = len(files(local))
    local.add(held["w0"], "w0")  # which is there already
    assert len(files(local)) == count
    local.add(wide(20, a=40, b=200), "w0", replace=True)
    made.clear()
    exact(sketches.sketches(local), held | {"w0": wide(20, a=40, b=200)})
    assert made == []


def test_what_is_missing_is_made_and_kept(local: Library, made: list[int]) -> None:
    held = fill(local)
    assert local.path is not None
    shutil.rmtree(local.path / "derived")
    made.clear()
    steps: list[tuple[int, int]] = []
    exact(sketches.sketches(local, progress=lambda *step: steps.append(step)), held)
    assert steps == [(i, len(held)) for i in range(1, len(held) + 1)]
    assert len(made) == len(held)
    files(local)[0].write_bytes(b"broken")
    made.clear()
    exact(sketches.sketches(local), held)
    assert 0 < len(made) < len(held)
    made.clear()
    exact(sketches.sketches(local), held)
    assert made == []


def test_a_folder_that_cannot_be_written_loses_nothing(local: Library) -> None:
    assert local.path is not None
    (local.path / "derived").write_text("a file where the folder should be")
    held = fill(local)
    exact(sketches.sketches(local), held)
    assert local.names().keys() == held.keys()


def test_many_files_are_merged_as_they_come(local: Library, made: list[int]) -> None:
    held = {}
    for i in range(LOOSE + 6):
        held[f"w{i:03}"] = wide(i, a=5)
        local.add(held[f"w{i:03}"], f"w{i:03}")
    assert len(files(local)) < LOOSE
    made.clear()
    exact(sketches.sketches(local), held)
    assert made == []
    assert len(files(local)) <= 2


def test_many_at_once(local: Library) -> None:
    held = {f"w{i}": wide(i, a=9, b=150) for i in range(12)}

    def work(i: int) -> SketchTable:
        library = Library.open(local.path)
        library.add(held[f"w{i}"], f"w{i}")
        return sketches.sketches(library)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(12)))
    for one in found:
        exact(one, {name: held[name] for name in one.names})
    exact(sketches.sketches(local), held)
    assert not [path for path in files(local) if path.suffix != ".safetensors"]


def test_gc_forgets_those_of_experts_that_are_gone(local: Library, made: list[int]) -> None:
    held = fill(local)
    sketches.sketches(local)
    for name in ("e0", "e1", "s0", "other"):
        local.remove(name)
        del held[name]
    assert local.path is not None
    kept = local.tags().values()
    size = sum(path.stat().st_size for path in files(local))
    count, freed = forget_rows(local.path, kept, SKETCHES, dry_run=True)
    assert count == 4
    assert forget_rows(local.path, kept, SKETCHES) == (4, freed)
    assert 0 < freed <= size - sum(path.stat().st_size for path in files(local))
    made.clear()
    exact(sketches.sketches(local), held)
    assert made == []


def test_numbers_too_large_are_refused_by_name(local: Library) -> None:
    """float32 holds them, their products it does not."""
    local.add(wide(0, a=9, b=9), "good")
    ill = wide(1, a=9, b=9)
    ill.deltas["b"].a[0, 0] = 1e30
    ill.deltas["b"].b[:] = 1e30
    local.add(ill, "ill")
    assert sketches.sketches(local, ["good"]).names == ("good",)
    with pytest.raises(RefusedError, match="'ill' holds NaN or infinity in 'b'"):
        sketches.sketches(local)


def test_what_cannot_be_compared(library: Library) -> None:
    with pytest.raises(UsageError, match="no experts"):
        sketches.sketches(library)
    library.add(wide(0, a=9), "w")
    with pytest.raises(NotFoundError, match="nobody"):
        sketches.sketches(library, ["nobody"])
    library.add(wide(0, a=10), "x")
    with pytest.raises(BaseMismatchError, match="shape of 'a'"):
        sketches.sketches(library)


def test_zero_and_tiny_updates(local: Library) -> None:
    """float16 has nothing below 6e-8; the scale keeps what is small, and zero is zero."""
    tiny, zero = wide(0, a=9), wide(0, a=9)
    tiny.deltas["a"].a.mul_(1e-20)
    zero.deltas["a"].b.zero_()
    local.add(tiny, "tiny")
    local.add(zero, "zero")
    found = sketches.sketches(local)
    assert np.abs(found.rows[0]).max() == 1
    assert found.scales[0] == pytest.approx(float(tiny.deltas["a"].sketch(
        seed=module_seed(0, "a")).abs().max()))  # fmt: skip
    assert not found.rows[1].any()
