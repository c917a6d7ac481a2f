"""Routing among 10,000 experts: what a shortlist costs, and how much of Arrow's weight it keeps.

    python benchmarks/synthetic.py                  all of it, about 8 minutes
    python benchmarks/synthetic.py --experts 2000   smaller

Nobody has 10,000 trained experts of one small model, so they are made up, and this is how:

The base is a Llama of 6 layers, width 512, inner width 1376, with random weights. There are 300
tasks; a task is a distribution over tokens: `words` of the vocabulary, drawn for it, with Zipf's
frequencies, and for a share of `shared` the same 100 words that all tasks use. A prompt is 128
tokens drawn from its task. Each expert belongs to a task and adapts all 42 linear modules. Its
prototype at a module is the mean of what that module sees of its task's tokens in the base (of 256
other tokens than the prompts'), made of length 1, plus Gaussian noise of length `noise`, other
noise for each expert and module. So at noise 1 the cosine of an expert to its task's mean is .7.

What this has of trained experts: groups that do the same, at all modules, directions that the
hidden states have; and the noise between two experts of one task. What it lacks: trained base
weights, real text, tasks that resemble each other. In layer 0 the queries, keys and values see one
token's embedding each, for which no mean of a task is a good direction: there Arrow spreads its
weight over hundreds of experts, and no 32 hold much. So beside the share of Arrow's weight that the
shortlist holds stands the share that the best 32 of all experts hold, which is what could be had.
"No structure" is random prototypes: nothing to find, and every choice of 32 holds next to nothing.

The library that is timed is a real one: each expert is added, read and indexed by the code that
does it for any. Its experts have rank 1 (117 KB each) and not 8 (0.94 MB each), which would be 10 GB
of random numbers. Rank 8 is timed on 100 experts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.prototypes import (
    Catalogue,
    catalogue,
    from_segments,
    prototype_segment,
    sketch,
)
from adaptlib.experts.shelf import Shelf
from adaptlib.routing.shortlist import CANDIDATES, arrow, estimate, fitting, look, shortlist, weigh

VOCAB, TASKS, TOKENS, SIZE, TOP_K = 4096, 300, 128, 32, 4
BASE = "adaptlib/synthetic-llama"
# words of a task's own, share of common words, noise; None is no structure
LEVELS: tuple[tuple[int, float, float] | None, ...] = (
    (16, 0.0, 1.0),
    (64, 0.0, 0.5),
    (64, 0.0, 1.0),
    (64, 0.0, 2.0),
    (256, 0.0, 1.0),
    (64, 0.5, 1.0),
    (64, 0.5, 2.0),
    None,
)
MAIN = (64, 0.0, 1.0)


# -- the setting ----------------------------------------------------------------------------------


def model() -> Any:
    """The base, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def shapes(base: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the adapted modules, sorted by name."""
    found = {n: tuple(m.weight.shape) for n, m in base.named_modules() if n.endswith("_proj")}
    return dict(sorted(found.items()))  # type: ignore[arg-type]


def tasks(words: int, shared: float, *, count: int = TASKS, seed: int = 1) -> Tensor:
    """The distribution of each task over the vocabulary, (count, VOCAB)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, VOCAB)
    common = torch.randperm(VOCAB, generator=generator)[:100]
    for row in found:
        row[torch.randperm(VOCAB, generator=generator)[:words]] += (1 - shared) * _zipf(words)
        row[common] += shared * _zipf(100)
    return found


def _zipf(count: int) -> Tensor:
    found = 1 / torch.arange(1, count + 1)
    return found / found.sum()


def prompt(task: Tensor, *, seed: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Tokens drawn from a task, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.multinomial(task, tokens, replacement=True, generator=generator)[None]
    }


def means(base: Any, of: Tensor) -> Tensor:
    """(task, W): at each module, the mean of what it sees of 256 tokens of the task, of length 1."""
    named = dict(base.named_modules())
    rows = []
    for number, task in enumerate(of):
        seen: dict[str, Tensor] = {}
        handles = [
            named[name].register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.update({name: args[0].mean((0, 1))})
            )
            for name in shapes(base)
        ]
        ids = [prompt(task, seed=100_000 + 2 * number + i)["input_ids"] for i in range(2)]
        with torch.no_grad():
            base(torch.cat(ids))
        for handle in handles:
            handle.remove()
        rows.append(torch.cat([normalize(seen[name], dim=0) for name in shapes(base)]))
    return torch.stack(rows)


def directions(
    mean: Tensor | None, widths: list[int], experts: int, noise: float, *, seed: int = 3
) -> Iterator[Tensor]:
    """The prototypes of `experts` experts, in pieces of up to 500, (some, W). Expert i is of task
    i modulo TASKS. Without `mean` they are random."""
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, experts, 500):
        number = torch.arange(begin, min(begin + 500, experts)) % TASKS
        parts = torch.randn(len(number), sum(widths), generator=generator).split(widths, 1)
        parts = [part / part.shape[1] ** 0.5 for part in parts]
        if mean is not None:
            here = mean[number].split(widths, 1)
            parts = [m + noise * part for m, part in zip(here, parts, strict=True)]
        yield torch.cat([normalize(part, dim=1) for part in parts], dim=1)


def name(i: int) -> str:
    return f"task-{i % TASKS:03d}-{i // TASKS}"


def expert(row: Tensor, of: dict[str, tuple[int, int]], *, rank: int = 1, seed: int = 0) -> Expert:
    """A LoRA expert in bfloat16 whose prototypes are about `row`: the first row of each A, which
    the first column of B makes ten times as strong as the others."""
    generator = torch.Generator().manual_seed(seed)
    deltas, begin = {}, 0
    for module, (d_out, d_in) in of.items():
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        b = torch.randn(d_out, rank, generator=generator) * 0.1
        a[0], b[:, 0] = row[begin : begin + d_in], b[:, 0] * 10
        deltas[module] = LoRADelta(a.bfloat16(), b.bfloat16())
        begin += d_in
    return Expert(BASE, deltas)


def write_index(
    path: Path, experts: int, *, mean: Tensor | None = None, noise: float = 1.0, rank: int = 1
) -> dict[str, float]:
    """A library of `experts` experts at `path`, and its index; what both took, in seconds, and what
    it takes to bring the index up to date after one more expert was added."""
    base = model()
    of = shapes(base)
    if mean is None:
        mean = means(base, tasks(*MAIN[:2]))
    library = Library.open(path, create=True)
    began, i = time.perf_counter(), 0
    for piece in directions(mean, [d_in for _, d_in in of.values()], experts, noise):
        for row in piece:
            library.add(expert(row, of, rank=rank, seed=i), name(i))
            i += 1
    added = time.perf_counter() - began
    began = time.perf_counter()
    catalogue(library)
    built = time.perf_counter() - began
    updates = []
    for k in range(7):
        library.add(expert(mean[k], of, rank=rank, seed=10**6 + k), f"one-more-{k}")
        began = time.perf_counter()
        catalogue(library)
        updates.append(time.perf_counter() - began)
    return {"add_s": added, "build_s": built, "update_s": statistics.median(updates)}


def in_memory(of: dict[str, tuple[int, int]], pieces: Iterator[Tensor]) -> Catalogue:
    """The catalogue of made-up prototypes, without experts or files."""
    segments, wanted = [], {}
    for piece in pieces:
        digests = [f"{len(wanted) + k:064x}" for k in range(len(piece))]
        wanted |= {name(len(wanted) + k): f"sha256:{d}" for k, d in enumerate(digests)}
        small = sketch(of, piece).numpy()
        segments.append(prototype_segment(digests, digests, piece.numpy(), small))
    return from_segments(wanted, {tuple(of.items()): segments})


# -- what is measured -----------------------------------------------------------------------------


def full_arrow(held: Catalogue, base: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    """The share of Arrow's weight of every expert that has any: for each token and module the
    softmax over the TOP_K best of all experts, computed in chunks, exactly."""
    (pack,) = held.packs
    named, seen = dict(base.named_modules()), {}
    handles = [
        named[module].register_forward_pre_hook(
            lambda _, args, module=module: seen.update({module: args[0].flatten(0, 1)})
        )
        for module in pack.shapes
    ]
    with torch.no_grad():
        base(**inputs)
    for handle in handles:
        handle.remove()
    weight = torch.zeros(len(held), dtype=torch.float64)
    begin = 0
    for module, (_, d_in) in pack.shapes.items():
        scores = [(seen[module] @ t[:, begin : begin + d_in].T).abs() for t in pack.tables]
        top, index = torch.cat(scores, 1).topk(TOP_K)
        weight.index_add_(0, index.flatten(), top.softmax(1).double().flatten())
        begin += d_in
    weight /= weight.sum()
    return {pack.names[i]: float(weight[i]) for i in weight.nonzero()[:, 0].tolist()}


def recall(
    base: Any, level: tuple[int, float, float] | None, experts: int, prompts: int, mean: Any
) -> dict[str, Any]:
    """At one level of structure: the share of full Arrow's weight that the shortlist holds, the
    best SIZE hold, and SIZE at random would; means and the worst over `prompts` prompts."""
    of = shapes(base)
    widths = [d_in for _, d_in in of.values()]
    noise = level[2] if level else 0.0
    held = in_memory(of, directions(mean, widths, experts, noise))
    drawn = tasks(*level[:2]) if level else tasks(VOCAB, 0.0)
    ours, best, counts = [], [], []
    for k in range(prompts):
        inputs = prompt(drawn[(k * 37) % TASKS], seed=k)
        weights = full_arrow(held, base, inputs)
        found = shortlist(held, base, inputs, size=SIZE, top_k=TOP_K)
        ours.append(sum(weights.get(one, 0.0) for one in found))
        best.append(sum(sorted(weights.values())[-SIZE:]))
        counts.append(len(weights))
    ratio = [a / b for a, b in zip(ours, best, strict=True)]
    return {
        "level": level,
        "shortlist": statistics.mean(ours),
        "shortlist_worst": min(ours),
        "best": statistics.mean(best),
        "ratio": statistics.mean(ratio),
        "ratio_worst": min(ratio),
        "experts_with_weight": statistics.median(counts),
    }


def serve(path: Path, *, repeats: int = 15) -> dict[str, float]:
    """Times of one process that opens a library and makes shortlists, in ms, medians of `repeats`
    prompts of other tasks each, the base's pass and the stages in turn; and its peak memory."""
    base = model()
    drawn = tasks(*MAIN[:2])
    library = Library.open(path)
    opened = _ms(lambda: catalogue(library))
    held = catalogue(library)
    times: dict[str, list[float]] = {}

    def note(key: str, work: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = work(*args)
        times.setdefault(key, []).append(1000 * (time.perf_counter() - began))
        return result

    def run(inputs: dict[str, Tensor]) -> None:
        with torch.no_grad():
            base(**inputs, use_cache=False)

    def rank(scores: list[Tensor]) -> Tensor:
        whole = torch.cat(scores)
        return whole.topk(min(CANDIDATES, len(whole))).indices

    def load(names: list[str]) -> None:
        for one in names:
            shelf[one]

    run(prompt(drawn[1], seed=1))
    first = _ms(lambda: shortlist(held, base, prompt(drawn[1], seed=1)))
    shelf = Shelf(library, budget=1 << 30)
    for k in range(repeats):
        inputs = prompt(drawn[(k * 37 + 5) % TASKS], seed=10 + k)
        note("prefill", run, inputs)
        packs = note("fitting", fitting, held, base)
        seen = note("look", look, base, inputs, list(packs[0].shapes))
        some = note("topk", rank, note("stage 1", estimate, packs, seen))
        note("stage 2", partial(weigh, top_k=TOP_K, temperature=1.0), packs, some, seen)
        note("prefill", run, inputs)
        found = note("shortlist", shortlist, held, base, inputs)
        note("prefill", run, inputs)
        note("arrow", arrow, held, list(found))
        note("load 32", load, list(found))
    result = {key: statistics.median(values) for key, values in times.items()}
    result["beyond"] = result["shortlist"] - result["prefill"]
    result["ratio"] = result["beyond"] / result["prefill"]
    spread = sorted(times["prefill"])
    result["prefill_p10"], result["prefill_p90"] = (
        spread[len(spread) // 10],
        spread[-len(spread) // 10],
    )
    return result | {"opened": opened, "first": first, "experts": len(held)} | _memory()


def _ms(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def _memory() -> dict[str, float]:
    """In MB: the peak of this process alone (what getrusage tells has the parent's in it), and
    what of the present is mapped files, which the system takes back when it needs to."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {
        key: int(lines[field].split()[0]) / 1024
        for key, field in (("peak_mb", "VmHWM"), ("own_mb", "RssAnon"), ("mapped_mb", "RssFile"))
    }


def measure(
    *, experts: int = 10_000, prompts: int = 12, levels: tuple[Any, ...] = LEVELS
) -> dict[str, Any]:
    """All of it: building, updating and opening the index, the stages of a shortlist, its recall by
    level of structure. What is written goes into a temporary directory."""
    base = model()
    mean = {kind: means(base, tasks(*kind)) for kind in {one[:2] for one in (*levels, MAIN) if one}}
    with tempfile.TemporaryDirectory(prefix="adaptlib-synthetic-") as folder:
        eight = write_index(Path(folder) / "eight", 100, mean=mean[MAIN[:2]], rank=8)
        path = Path(folder) / "library"
        built = write_index(path, experts, mean=mean[MAIN[:2]], noise=MAIN[2])
        index = sum(f.stat().st_size for f in (path / "derived").rglob("*.safetensors"))
        command = [sys.executable, __file__, "--serve", str(path)]
        served = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        "experts": experts,
        "index": built | {"bytes": index, "ms_each_rank_8": 1000 * eight["build_s"] / 100},
        "times": served,
        "recall": [
            recall(base, level, experts, prompts, mean[level[:2]] if level else None)
            for level in levels
        ],
    }


def report(found: dict[str, Any]) -> Iterator[str]:
    """The figures as text."""
    index, times = found["index"], found["times"]
    yield f"{found['experts']:,} experts, 42 modules, {torch.get_num_threads()} threads"
    yield (
        f"index: {index['bytes'] / 1e6:,.0f} MB; built in {index['build_s']:.0f} s (rank 1; rank 8 "
        f"{index['ms_each_rank_8']:.1f} ms an expert); one more expert {1000 * index['update_s']:.0f} ms"
    )
    yield (
        f"opened in {times['opened']:.0f} ms; first shortlist {times['first']:.0f} ms; peak memory "
        f"{times['peak_mb']:,.0f} MB (at the end {times.get('own_mb', 0):,.0f} MB of its own and "
        f"{times.get('mapped_mb', 0):,.0f} MB of mapped files)"
    )
    yield (
        f"base's pass over {TOKENS} tokens {times['prefill']:.1f} ms (10th to 90th percentile "
        f"{times['prefill_p10']:.1f} to {times['prefill_p90']:.1f}); shortlist beyond it "
        f"{times['beyond']:.1f} ms, {times['ratio']:.2f} of it"
    )
    stages = ("fitting", "stage 1", "topk", "stage 2", "arrow", "load 32")
    yield "  " + ", ".join(f"{stage} {times[stage]:.1f} ms" for stage in stages)
    yield ""
    yield f"| structure | experts with weight | best {SIZE} hold | shortlist holds | of the best | worst |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in found["recall"]:
        level = row["level"]
        text = "none"
        if level:
            text = f"{level[0]} words, {level[1]:.0%} common, noise {level[2]}"
        yield (
            f"| {text} | {row['experts_with_weight']:.0f} | {row['best']:.3f} | "
            f"{row['shortlist']:.3f} | {row['ratio']:.3f} | {row['ratio_worst']:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Routing among thousands of experts.")
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--serve", type=Path, help="time shortlists in this library, as JSON")
    arguments = parser.parse_args()
    if arguments.serve:
        print(json.dumps(serve(arguments.serve)))
        return
    for line in report(measure(experts=arguments.experts)):
        print(line)


if __name__ == "__main__":
    main()
