"""What merging keeps: experts of 20 tasks merged by every method, scored on those and on new tasks.

    python benchmarks/merging_bundle.py --data DATA --base BASE --experts OUT/experts --lines FILE

`DATA` holds the tasks' JSONL files and tasks.json; `OUT` is the folder of `adaptlib.demo.make`. Each
merge is scored twice: as it comes, and times a scale that is chosen by the exact match on the first
rows of the validation splits of the held-in tasks; no test row chooses anything, and no held-out
task either. Lines are written as they come, so the same command again goes on; several processes
may work on one file. `--json FILE` writes what `report.py` reads.
"""

import argparse
import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COUNTS = (2, 5, 10, 20)  # experts merged, the first of TASKS
VALID = 40  # rows of each validation split that choose the scale
MAX_LENGTH = 192
# kind -> how its experts' folders are called
KINDS = {
    "lora": "{}",
    "element": "{}-sparse",
    "block": "{}-block",
    "full": "{}-full",
    "element-0.02": "{}-sparse-0.02",
    "block-0.02": "{}-block-0.02",
}
MAIN = ("lora", "element", "block", "full")
# Those that are followed over the number of experts, and through the smaller keep ratio.
FOLLOWED = ("linear", "ties", "breadcrumbs", "uniform_sparse", "tsv", "wudi")
SVD_RANK = 8  # of one expert
NORMS = (0.5, 1.0, 2.0, 4.0)  # of one expert; where the scale of a merged one is searched


@dataclass(frozen=True)
class Cell:
    """One merge: which experts, how many, how."""

    kind: str
    count: int
    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.kind} {self.count} {self.method}{extra}"


def cells(methods: Sequence[str]) -> Iterator[Cell]:
    """All that is measured, what the report needs most first."""
    for method in methods:
        for kind in MAIN:
            yield _cell(kind, COUNTS[-1], method)
    for count in COUNTS[:-1]:
        for method in (m for m in FOLLOWED if m in methods):
            for kind in MAIN:
                yield _cell(kind, count, method)
    for method in (m for m in FOLLOWED if m in methods):
        for kind in KINDS:
            if kind not in MAIN:
                yield _cell(kind, COUNTS[-1], method)


def _cell(kind: str, count: int, method: str) -> Cell:
    options = (("rank", SVD_RANK),) if method == "svd" and kind != "lora" else ()
    return Cell(kind, count, method, options)


class Bench:
    """The base model, the tasks and the experts, read once."""

    def __init__(self, data: Path, base: Path, experts: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from adaptlib.demo.units import TASKS, friendly

        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.folder = experts
        self.friendly = friendly
        self.held_in = TASKS[: COUNTS[-1]]
        known = json.loads((data / "tasks.json").read_text())
        entries = known if isinstance(known, list) else [v | {"name": k} for k, v in known.items()]
        self.held_out = [t["name"] for t in entries if t["role"] == "held_out"]
        self.tasks = {n: self._read(data, n) for n in (*self.held_in, *self.held_out)}

    def _read(self, data: Path, name: str) -> Any:
        from adaptlib.training import read_task

        folder = data / "tasks" if (data / "tasks").is_dir() else data
        return read_task(folder / f"{name}.jsonl")

    def expert(self, kind: str, task: str) -> Any:
        from adaptlib.experts.codec import read_directory, unpack

        return unpack(read_directory(self.folder / KINDS[kind].format(self.friendly(task))))

    def score(self, expert: Any, task: str, split: str, limit: int | None = None) -> str:
        """For each row whether the answer was right: "0110..."."""
        from adaptlib.evaluation.score import exact_match, same
        from adaptlib.training.modules import applied
        from adaptlib.training.tasks import output_of

        read = self.tasks[task]
        with applied(self.model, expert):
            found = exact_match(
                self.model, self.tokenizer, read, split=split, limit=limit, max_length=MAX_LENGTH
            )
        rows = read.split(split)[:limit]
        pairs = zip(found.predictions, map(output_of, rows), strict=True)
        return "".join("01"[same(prediction, output)] for prediction, output in pairs)

    def scores(
        self, expert: Any, tasks: Sequence[str], split: str, limit: int | None = None
    ) -> dict[str, str]:
        dense = densed(expert)
        return {task: self.score(dense, task, split, limit) for task in tasks}


def densed(expert: Any) -> Any:
    """The same expert with its updates as full matrices: put on a model once a task, they are
    cheaper so than as products."""
    import torch

    from adaptlib.experts import SparseDelta

    deltas = {}
    for name, delta in expert.deltas.items():
        dense = delta.dense()
        index = torch.arange(dense.numel(), dtype=torch.int32)
        deltas[name] = SparseDelta(index, dense.reshape(-1), delta.shape)
    return replace(expert, deltas=deltas)


def scaled(expert: Any, factor: float) -> Any:
    """factor · ΔW."""
    from adaptlib.experts.arithmetic import weighted_sum

    deltas = {name: weighted_sum([delta], [factor]) for name, delta in expert.deltas.items()}
    return replace(expert, deltas=deltas)


def mean(hits: Mapping[str, str]) -> float:
    """Over the tasks, each counting alike."""
    return sum(text.count("1") / len(text) for text in hits.values()) / len(hits)


def best_scale(
    bench: Bench, expert: Any, tasks: Sequence[str], typical: float
) -> tuple[float, dict[float, float]]:
    """The scale of the highest exact match on the validation rows, and every scale that was tried,
    with its score: 1, those at which the merged expert is as large as one expert (`typical`, the
    mean Frobenius norm) times NORMS, and the best of these by √2 up and down."""
    tried: dict[float, float] = {}

    def value(scale: float) -> float:
        if scale not in tried:
            hits = bench.scores(scaled(expert, scale), tasks, "valid", VALID)
            tried[scale] = round(mean(hits), 5)
        return tried[scale]

    unit = typical / max(norm(expert), 1e-12)
    best = max((1.0, *(round(unit * factor, 4) for factor in NORMS)), key=value)
    best = max((best, round(best * 2**0.5, 4), round(best / 2**0.5, 4)), key=value)
    return best, tried


def norm(expert: Any) -> float:
    """The Frobenius norm over all modules."""
    return sum(delta.norm() ** 2 for delta in expert.deltas.values()) ** 0.5


def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """A line of the file."""
    from adaptlib.merging import MERGES

    held_in = bench.held_in[: cell.count]
    experts = {bench.friendly(task): bench.expert(cell.kind, task) for task in held_in}
    options = dict(cell.options)
    if MERGES[cell.method].measure is not None:
        from adaptlib.evaluation.merge_data import merge_data

        tasks = {bench.friendly(task): bench.tasks[task] for task in held_in}
        options["data"] = merge_data(bench.model, bench.tokenizer, tasks)
    started = time.monotonic()
    merged = MERGES[cell.method](experts, **options)
    seconds = time.monotonic() - started
    line = {
        "name": cell.name,
        "kind": cell.kind,
        "count": cell.count,
        "method": cell.method,
        "options": dict(cell.options),
        "seconds": round(seconds, 3),
        "error": merged.card["merge"]["error"],
        "rank": merged.rank,
        "params": merged.params,
        "norm": round(norm(merged), 4),
    }
    typical = sum(map(norm, experts.values())) / len(experts)
    scale, tried = best_scale(bench, merged, held_in, typical)
    tests = (*held_in, *bench.held_out)
    line |= {"scale": scale, "tried": tried, "test": bench.scores(merged, tests, "test")}
    if scale == 1:
        return line | {"tuned": line["test"]}
    return line | {"tuned": bench.scores(scaled(merged, scale), tests, "test")}


def own(bench: Bench, kind: str) -> dict[str, Any]:
    """What merges are measured by: on each held-in task its own expert."""
    hits = {task: bench.score(bench.expert(kind, task), task, "test") for task in bench.held_in}
    return {"name": f"{kind} own", "kind": kind, "test": hits}


def read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["name"]: line for line in lines}


def packed(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with its hits as "rows:hexadecimal", a quarter as long."""
    hits = {
        key: {task: f"{len(bits)}:{int(bits, 2):x}" for task, bits in line[key].items()}
        for key in ("test", "tuned")
        if key in line
    }
    return {key: value for key, value in line.items() if key != "tried"} | hits


def claim(path: Path, name: str) -> bool:
    """Whether this process is the one to do it: the first that says so, by a file of claims."""
    with path.with_suffix(".claims").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if name in file.read().splitlines():
            return False
        file.write(name + "\n")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", help="all of MERGES where not given")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS))
    parser.add_argument("--again", action="store_true", help="forget who claimed what")
    parser.add_argument("--json", type=Path, help="only write what report.py reads")
    args = parser.parse_args()
    from adaptlib.merging import MERGES

    if args.again:
        args.lines.with_suffix(".claims").unlink(missing_ok=True)
    bench = Bench(args.data, args.base, args.experts)
    if args.json:
        found = {"held_in": bench.held_in, "held_out": bench.held_out, "valid": VALID}
        found["lines"] = {name: packed(line) for name, line in sorted(read(args.lines).items())}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    for kind in args.kinds:
        if f"{kind} own" not in read(args.lines) and claim(args.lines, f"{kind} own"):
            line = own(bench, kind)
            write(args.lines, line)
            print(line["name"], round(mean(line["test"]), 3), flush=True)
    for cell in cells(args.methods or list(MERGES)):
        if cell.kind not in args.kinds or cell.count not in args.counts:
            continue
        if cell.name in read(args.lines) or not claim(args.lines, cell.name):
            continue
        line = measure(bench, cell)
        write(args.lines, line)
        split = [
            round(mean({t: line[which][t] for t in tasks}), 3)
            for which in ("test", "tuned")
            for tasks in (bench.held_in[: cell.count], bench.held_out)
        ]
        print(cell.name, *split, f"scale {line['scale']} error {line['error']}", flush=True)


def write(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
