"""Clustering: time and memory by number of experts, what factors see that updates do not, and what
assigning loses against clustering again.

    python benchmarks/clustering.py                     all of it; adding 10,000 experts takes 10 minutes
    python benchmarks/clustering.py --experts 1000      smaller
    python benchmarks/clustering.py --part factors      one part: scale, factors, assign or k
    python benchmarks/clustering.py --real DIRECTORY    also on adaptlib directories, one a LoRA expert

Scale. Nobody has 10,000 experts of one model, so they are made up, and added one by one as any are:
rank 1, bfloat16, on all 112 linear modules of 16 layers, as Llama 3.2 1B has them, 256 wide instead of
2048, for the sketch is as large and the library is not. There are 300 tasks; the factors of an expert
are its task's, plus noise of the same length. Each figure is of a fresh process that opens the library
and groups it: seconds after the imports, CPU seconds of all threads with them, and the peak of its
memory, with mapped files.

Factors. LoRA's A -> R A, B -> B R⁻¹ is the same expert. Three kinds of R for each module of each expert:
a rotation, a random well-conditioned matrix, and a diagonal one of scales e^N(0, 1). Shown is the
adjusted Rand index between the groups before and after (`kept`), and with the planted families or, for
trained experts, the categories of their tasks (`truth`), of the raw factors as published, of sketches
and of exact products.

Assign. A clustering of 80% of the experts, the rest assigned; beside it all are clustered at once.
`agree` is the adjusted Rand index of the two on the rest, `again` that between two clusterings of all,
from other seeds: assigning cannot agree more with one than another one does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from adaptlib.clustering import (
    CLUSTERINGS,
    Clustering,
    Embedding,
    assign,
    candidates,
    cluster,
    cluster_library,
    silhouette,
)
from adaptlib.clustering.choose import best_k
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.codec import read_directory, unpack

BASE, TASKS, WIDTH = "adaptlib/synthetic-1b", 300, 256
SIDES = {"q_proj": (1, 1), "k_proj": (0.25, 1), "v_proj": (0.25, 1), "o_proj": (1, 1)}
SIDES |= {"gate_proj": (4, 1), "up_proj": (4, 1), "down_proj": (1, 4)}  # d_out, d_in by width
KINDS = ("factors", "sketches", "gram")


def shapes(layers: int = 16, width: int = WIDTH) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear modules of Llama 3.2 1B, of another width."""
    return {
        f"model.layers.{layer}.{'mlp' if max(sides) > 1 else 'self_attn'}.{name}": (
            int(sides[0] * width),
            int(sides[1] * width),
        )
        for layer in range(layers)
        for name, sides in SIDES.items()
    }


# -- scale ----------------------------------------------------------------------------------------


def task(number: int, of: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """All factors of a task at rank 1, in one row."""
    return np.random.default_rng([0, number]).standard_normal(
        sum(map(sum, of.values())), np.float32
    )


def made(row: np.ndarray, of: Mapping[str, tuple[int, int]]) -> Expert:
    flat, at = torch.from_numpy(row).bfloat16(), 0
    deltas = {}
    for module, (d_out, d_in) in of.items():
        a, b = flat[at : at + d_in], flat[at + d_in : at + d_in + d_out]
        deltas[module] = LoRADelta(a[None], b[:, None])
        at += d_in + d_out
    return Expert(BASE, deltas)


def fill(library: Library, experts: int) -> float:
    """Add so many experts; seconds each."""
    of = shapes()
    tasks = [task(number, of) for number in range(min(TASKS, experts))]
    began = time.perf_counter()
    for i in range(experts):
        noise = np.random.default_rng([1, i]).standard_normal(len(tasks[0]), np.float32)
        library.add(made(tasks[i % len(tasks)] + noise, of), f"task-{i % TASKS:03}-{i:05}")
    return (time.perf_counter() - began) / experts


def measured(path: Path, experts: int, method: str, k: str) -> dict[str, Any]:
    """What one process takes to open a library and group it; `command` is the command line's."""
    began = time.perf_counter()
    library = Library.open(path)
    names = sorted(library.names(), key=lambda name: name[-5:])[:experts]
    found = cluster_library(library, names, method=method, k=k if k == "auto" else int(k))
    took = time.perf_counter() - began
    labels = {name: label for label, held in found.clusters.items() for name in held}
    inside = [name for name in names if name in labels]
    return {
        "experts": len(names),
        "seconds": took,
        "cpu": time.process_time(),
        "peak_mb": peak(),
        "k": found.k,
        "outliers": len(found.outliers),
        "ari": adjusted_rand_score([n[:8] for n in inside], [labels[n] for n in inside]),
        "features": found.basis,
    }


def peak() -> float:
    """The most memory that this process had, in MB, mapped files too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def scale(experts: int, folder: Path | None) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="adaptlib-clustering-") as made_here:
        path = folder or Path(made_here)
        library = Library.open(path, create=True)
        if not len(library):
            each = fill(library, experts)
            yield f"added {experts:,} experts of {len(shapes())} modules, {1000 * each:.1f} ms each"
        size = sum(f.stat().st_size for f in (path / "derived" / "sketches").rglob("*.safetensors"))
        count = sum(1 for _ in (path / "derived" / "sketches").rglob("*.safetensors"))
        yield f"sketches: {size / 1e6:,.0f} MB in {count} files"
        yield ""
        yield "| experts | method | k asked | seconds | of CPU | peak MB | groups | outliers | ARI with 300 tasks |"
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
        sizes = [n for n in (100, 1000) if n < experts] + [experts]
        runs = [(n, "mbc", k) for n in sizes for k in ("10", "auto")]
        runs += [(experts, "mbc", str(min(TASKS, experts))), (experts, "hdbscan", "10")]
        runs += [(experts, "agglomerative", str(min(TASKS, experts)))]
        for n, method, k in runs:
            line = [sys.executable, __file__, "--measure", str(path), "--experts", str(n)]
            line += ["--method", method, "--k", k]
            ran = subprocess.run(line, check=True, capture_output=True, text=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            yield (
                f"| {found['experts']:,} | {method} | {k} | {found['seconds']:.1f} | {found['cpu']:.1f} | "
                f"{found['peak_mb']:,.0f} | {found['k']} | {found['outliers']} | {found['ari']:.3f} |"
            )
        yield ""
        yield command(path, ["--k", "10"])


def command(path: Path, words: list[str]) -> str:
    """The same by `adaptlib cluster`, all of it: from its start to its end."""
    line = [
        str(Path(sys.executable).with_name("adaptlib")),
        "cluster",
        "-L",
        str(path),
        "-q",
        *words,
    ]
    code = (
        "import resource, subprocess, sys, time; t = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *line], check=True, capture_output=True, text=True
    )
    seconds, kilobytes = ran.stdout.split()
    said = " ".join(["adaptlib cluster", *words])
    return f"`{said}`: {float(seconds):.1f} s, peak {int(kilobytes) / 1024:,.0f} MB"


# -- what factors see -----------------------------------------------------------------------------


def families(
    seed: int, *, count: int = 8, each: int = 5, noise: float = 1.0
) -> tuple[dict[str, Expert], list[int]]:
    """Experts that began from one A, as training has it: A = A₀ + its family's + noise."""
    of, random = shapes(layers=2, width=64), torch.Generator().manual_seed(seed)

    def near(*centres: Any, shape: tuple[int, int]) -> Any:
        return sum(centres) + noise * torch.randn(shape, generator=random)

    start = {m: 3 * torch.randn(8, d_in, generator=random) for m, (_, d_in) in of.items()}
    experts, truth = {}, []
    for family in range(count):
        a = {m: torch.randn(8, d_in, generator=random) for m, (_, d_in) in of.items()}
        b = {m: torch.randn(d_out, 8, generator=random) for m, (d_out, _) in of.items()}
        for _ in range(each):
            deltas = {
                m: LoRADelta(near(start[m], a[m], shape=(8, d_in)), near(b[m], shape=(d_out, 8)))
                for m, (d_out, d_in) in of.items()
            }
            experts[f"e{len(truth):03}"] = Expert(BASE, deltas)
            truth.append(family)
    return experts, truth


def refactored(expert: Expert, kind: str, seed: int) -> Expert:
    """The same expert by other factors: A -> R A, B -> B R⁻¹."""
    random = torch.Generator().manual_seed(seed)
    deltas = {}
    for module, delta in expert.deltas.items():
        assert isinstance(delta, LoRADelta)
        draw = torch.randn(delta.rank, delta.rank, generator=random, dtype=torch.float64)
        if kind == "rotation":
            r = torch.linalg.qr(draw)[0]
        elif kind == "scales":
            r = torch.diag(draw[0].exp())
        else:
            r = draw + 3 * torch.eye(delta.rank, dtype=torch.float64)
        b = delta.b.double() @ torch.linalg.inv(r)
        deltas[module] = LoRADelta((r @ delta.a.double()).float(), b.float(), delta.scale)
    return Expert(expert.base, deltas, expert.card)


def labels(found: Clustering) -> list[str]:
    of = {name: label for label, held in found.clusters.items() for name in held}
    return [of[name] for name in found.names]


def factors(settings: Mapping[str, tuple[dict[str, Expert], list[Any]]], k: int) -> Iterator[str]:
    yield "| experts | R | features | truth before | truth after | kept |"
    yield "|---|---|---|---:|---:|---:|"
    for setting, (experts, truth) in settings.items():
        count = len(set(truth)) if setting != "trained" else k
        for kind in ("rotation", "random", "scales"):
            other = {
                name: refactored(expert, kind, seed)
                for seed, (name, expert) in enumerate(sorted(experts.items()))
            }
            for features in KINDS:
                before, after = (
                    labels(cluster(side, k=count, features=features)) for side in (experts, other)
                )
                told = [adjusted_rand_score(truth, side) for side in (before, after)]
                kept = adjusted_rand_score(before, after)
                row = f"{told[0]:.3f} | {told[1]:.3f} | {kept:.3f}"
                yield f"| {setting} | {kind} | {features} | {row} |"


# -- assigning ------------------------------------------------------------------------------------


def assigning(settings: Mapping[str, tuple[dict[str, Expert], list[Any]]], k: int) -> Iterator[str]:
    yield "| experts | features | agree | again | truth assigned | truth clustered |"
    yield "|---|---|---:|---:|---:|---:|"
    for setting, (experts, truth) in settings.items():
        count = len(set(truth)) if setting != "trained" else k
        names = sorted(experts)
        told = dict(zip(names, truth, strict=True))
        for features in KINDS:
            rows = []
            full = cluster(experts, k=count, features=features)
            whole = dict(zip(full.names, labels(full), strict=True))
            other = labels(cluster(experts, k=count, features=features, seed=1))
            again = adjusted_rand_score(labels(full), other)
            for draw in range(10):
                random = np.random.default_rng(draw)
                rest = set(random.choice(names, len(names) // 5, replace=False).tolist())
                old = {name: experts[name] for name in names if name not in rest}
                found = cluster(old, k=count, features=features)
                new = assign(found, {n: experts[n] for n in rest}, members=old)
                side = [new[n].label for n in sorted(rest)]
                rows.append(
                    (
                        adjusted_rand_score([whole[n] for n in sorted(rest)], side),
                        adjusted_rand_score([told[n] for n in sorted(rest)], side),
                        adjusted_rand_score(
                            [told[n] for n in sorted(rest)], [whole[n] for n in sorted(rest)]
                        ),
                    )
                )
            agree, ours, theirs = (statistics.mean(column) for column in zip(*rows, strict=True))
            yield f"| {setting} | {features} | {agree:.3f} | {again:.3f} | {ours:.3f} | {theirs:.3f} |"


# -- the number of groups -------------------------------------------------------------------------


def numbers(settings: Mapping[str, tuple[dict[str, Expert], list[Any]]]) -> Iterator[str]:
    """What `--k auto` says, and what silhouette alone would."""
    yield "| experts | groups | method | auto, seeds 0 to 4 | silhouette alone | ARI at auto, seed 0 |"
    yield "|---|---:|---|---|---:|---:|"
    for setting, (experts, truth) in settings.items():
        found = cluster(experts, k=1)
        cards = {name: expert.card for name, expert in experts.items()}
        placed = Embedding.of(found.names, found.unit, cards)
        for method in ("mbc", "agglomerative"):
            group = CLUSTERINGS[method]
            told = [best_k(placed, group, seed=seed) for seed in range(5)]
            tried = {
                c.k: silhouette(placed, group(placed, c.k, seed=0))
                for c in candidates(placed, group)
            }
            alone = max(tried, key=lambda k: tried[k] or -1.0)
            ari = adjusted_rand_score(truth, group(placed, told[0], seed=0))
            count = len(set(truth)) if setting != "trained" else f"{len(set(truth))} categories"
            yield f"| {setting} | {count} | {method} | {', '.join(map(str, told))} | {alone} | {ari:.3f} |"


# -- all ------------------------------------------------------------------------------------------


def trained(directory: Path) -> tuple[dict[str, Expert], list[Any]]:
    """The LoRA experts of one task each in adaptlib directories, and their categories."""
    experts = {}
    for place in sorted(directory.iterdir()):
        if (place / "expert.json").is_file() and place.name.count("-block") + place.name.count(
            "-sparse"
        ) == 0:
            expert = unpack(read_directory(place))
            if expert.kind == "lora" and "category" in expert.card:
                experts[place.name] = expert
    return experts, [experts[name].card["category"] for name in sorted(experts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Clustering: scale, factors, assigning, the number."
    )
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--part", choices=("scale", "factors", "assign", "k"))
    parser.add_argument("--real", type=Path, help="adaptlib directories of trained LoRA experts")
    parser.add_argument("--folder", type=Path, help="keep the library of made-up experts here")
    parser.add_argument(
        "--measure", type=Path, help="group this library, and say what it took as JSON"
    )
    parser.add_argument("--method", default="mbc")
    parser.add_argument("--k", default="10")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.experts, options.method, options.k)))
        return
    settings = {"planted": families(0), "planted, faint": families(0, noise=2.0)}
    if options.real:
        settings["trained"] = trained(options.real)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "factors": lambda: factors(settings, 10),
        "assign": lambda: assigning(settings, 10),
        "k": lambda: numbers(settings),
        "scale": lambda: scale(options.experts, options.folder),
    }
    for part, lines in parts.items():
        if options.part in (None, part):
            print(f"\n## {part}\n", flush=True)
            for line in lines():
                print(line, flush=True)


if __name__ == "__main__":
    main()
