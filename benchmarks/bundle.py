"""What the bundled experts and routers are worth, on the test splits of their own tasks.

    python benchmarks/bundle.py --data DATA [--workers 2] [--rows 200]

`DATA` (or ADAPTLIB_DATA) holds tasks.tar.xz and tasks.json. Writes docs/results.json as it goes, so a
run that was interrupted goes on, and docs/results.md from it. Nothing is left out: an expert that
does no better than its base stands in the table like the others.
"""

import argparse
import hashlib
import json
import os
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results.json"
REPORT = ROOT / "docs" / "results.md"
TOP_K = 4
K = 10  # clusters


def unpack(data: Path, where: Path) -> Path:
    """The task files, unpacked beside their listing; the folder with one .jsonl a task."""
    with tarfile.open(data / "tasks.tar.xz") as archive:
        archive.extractall(where, filter="data")
    folder = next(where.rglob("*.jsonl")).parent
    (folder / "tasks.json").write_bytes((data / "tasks.json").read_bytes())
    return folder


def measure_task(folder: Path, task_name: str, rows: int) -> dict[str, Any]:
    """Exact match of base, own expert, uniform and Arrow on one task, and Arrow's first choices."""
    import torch

    torch.set_num_threads(1)
    from adaptlib.clustering import mbc
    from adaptlib.demo import experts
    from adaptlib.evaluation import exact_match, label_accuracy
    from adaptlib.experts.base import DEMO_BASE, load
    from adaptlib.routing import Arrow, Named, Uniform, attach
    from adaptlib.training import read_task

    started = time.monotonic()
    task = read_task(folder / f"{task_name}.jsonl")
    model, tokenizer = load(DEMO_BASE)
    all_experts = experts()
    own = [name for name, expert in all_experts.items() if expert.card["task"] == task_name]
    loras = {name: e for name, e in all_experts.items() if e.kind == "lora"}
    result: dict[str, Any] = {"task": task_name, "category": task.category, "experts": {}}

    def score(on: Any) -> float:
        return exact_match(on, tokenizer, task, limit=rows, batch_size=64).value

    test = [row.output.strip().casefold() for row in task.split("test")[:rows]]
    result["n"] = len(test)
    result["majority"] = max(map(test.count, test)) / len(test)
    result["base"] = score(model)
    # A base model that was never told the form of an answer cannot match one exactly, so for tasks
    # with labels it is also asked which label it finds likeliest.
    result["base_label"] = (
        label_accuracy(model, tokenizer, task, limit=rows).value if task.labels else None
    )
    for name in own:
        alone = {name: all_experts[name]}
        with attach(model, alone, Named.fit(alone, expert=name)) as routed:
            result["experts"][name] = score(routed)
    mine = [name for name in own if name in loras]
    if not mine:
        return result | {"seconds": time.monotonic() - started}
    result["own"] = mine[0]
    routers = {
        "uniform": Uniform.fit(loras),
        "arrow": Arrow.fit(loras, top_k=TOP_K),
        "arrow_top1": Arrow.fit(loras, top_k=1),
    }
    for label, router in routers.items():
        with attach(model, loras, router) as routed:
            result[label] = score(routed)
    clusters = mbc(loras, k=min(K, len(loras)))
    cluster = next(members for members in clusters.values() if mine[0] in members)
    chosen = first_choices(model, tokenizer, task, loras, routers["arrow"], rows)
    result |= {
        "first_own": sum(name == mine[0] for name in chosen) / len(chosen),
        "first_cluster": sum(name in cluster for name in chosen) / len(chosen),
        "chance_own": 1 / len(loras),
        "chance_cluster": len(cluster) / len(loras),
        "most_chosen": max(sorted(set(chosen)), key=chosen.count),
        "seconds": time.monotonic() - started,
    }
    return result


def measure_sparse(folder: Path, task_name: str, rows: int) -> dict[str, Any]:
    """The same for the sparse experts among themselves, on the task of one of them."""
    import torch

    torch.set_num_threads(1)
    from adaptlib.demo import experts
    from adaptlib.evaluation import exact_match
    from adaptlib.experts.base import DEMO_BASE, load
    from adaptlib.routing import Arrow, Named, Uniform, attach
    from adaptlib.training import read_task

    task = read_task(folder / f"{task_name}.jsonl")
    model, tokenizer = load(DEMO_BASE)
    sparse = {name: e for name, e in experts().items() if e.kind == "sparse"}
    own = next(name for name, expert in sparse.items() if expert.card["task"] == task_name)
    result: dict[str, Any] = {"task": task_name, "own": own, "experts": len(sparse)}
    routers = {
        "uniform": Uniform.fit(sparse),
        "arrow": Arrow.fit(sparse, top_k=TOP_K),
        "oracle": Named.fit(sparse, expert=own),
    }
    for label, router in routers.items():
        with attach(model, sparse, router) as routed:
            score = exact_match(routed, tokenizer, task, limit=rows, batch_size=64)
            result[label] = score.value
    result["first"] = first_choices(model, tokenizer, task, sparse, routers["arrow"], rows)
    return result


def first_choices(
    model: Any, tokenizer: Any, task: Any, experts: Any, router: Any, rows: int
) -> list[str]:
    """For each prompt the expert with the most routing weight over its tokens and modules."""
    import torch

    from adaptlib.routing import attach

    chosen = []
    with attach(model, experts, router) as routed, torch.inference_mode():
        for row in task.split("test")[:rows]:
            ids = tokenizer(task.prompt(row), return_tensors="pt")
            with routed.record() as trace:
                routed(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
            chosen.append(next(iter(trace.shares())))
    return chosen


def bundle_digest() -> str:
    """One digest over the bundle's files: results of another bundle are not mixed in."""
    from adaptlib.demo import BUNDLE

    digest = hashlib.sha256()
    for path in sorted(BUNDLE.rglob("*.safetensors")):
        digest.update(path.relative_to(BUNDLE).as_posix().encode() + path.read_bytes())
    return "sha256:" + digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ADAPTLIB_DATA"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    if options.data is None:
        raise SystemExit("say where the tasks are: --data DIR, or ADAPTLIB_DATA")
    from adaptlib.demo import experts

    tasks = sorted({expert.card["task"] for expert in experts().values()})
    done: dict[str, Any] = {"bundle": bundle_digest(), "rows": options.rows, "tasks": {}}
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        if before["bundle"] == done["bundle"] and before["rows"] == options.rows:
            done = before
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack(Path(options.data), Path(scratch))
        todo = [task for task in tasks if task not in done["tasks"]]
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(measure_task, folder, task, options.rows) for task in todo]
            for job in as_completed(jobs):
                result = job.result()
                done["tasks"][result["task"]] = result
                RESULTS.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
                print(f"{result['task']:45} {result['seconds']:6.1f} s", flush=True)
            kinds = {e.card["task"] for e in experts().values() if e.kind == "sparse"}
            todo = sorted(kinds - done.setdefault("sparse", {}).keys())
            jobs = [pool.submit(measure_sparse, folder, task, options.rows) for task in todo]
            for job in as_completed(jobs):
                result = job.result()
                done["sparse"][result["task"]] = result
                RESULTS.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    REPORT.write_text(report(done))


def report(done: dict[str, Any]) -> str:
    """docs/results.md from the numbers."""
    from adaptlib.demo import experts

    all_experts = experts()
    tasks = done["tasks"]
    lines = [
        "# Results: the bundle",
        "",
        "Written by `python benchmarks/bundle.py --data DATA` from `docs/results.json`; every number",
        "is exact match on the first rows of the task's test split (greedy, case-insensitive), as",
        "measured. The base model and the experts are those in `adaptlib/demo/bundle/`.",
        "",
        "## Each expert against the base",
        "",
        "*Base* is the base model's exact match; it was never shown the form of an answer, so for tasks",
        "with labels *base label* is how often the right label is the likeliest to it (highest mean",
        "log-likelihood). *Majority* is the score of always giving the commonest answer.",
        "",
        "| expert | task | category | kind | rows | base | base label | majority | expert |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    gains: dict[str, list[float]] = {}
    for name, expert in sorted(all_experts.items()):
        row = tasks[expert.card["task"]]
        value, kind = row["experts"][name], _kind(expert)
        label = row["base_label"]
        best = max(row["base"], label or 0.0, row["majority"])
        gains.setdefault(kind, []).append(value - best)
        lines.append(
            f"| {name} | {row['task']} | {row['category']} | {kind} | {row['n']} | "
            f"{row['base']:.3f} | {'' if label is None else f'{label:.3f}'} | "
            f"{row['majority']:.3f} | {value:.3f} |"
        )
    lines.append("")
    for kind, values in gains.items():
        lines.append(
            f"- {kind}: {len(values)} experts, above the best of base, base label and majority by "
            f"{sum(values) / len(values):.3f} on average, by {min(values):.3f} at least"
        )
    routed = [row for row in tasks.values() if "own" in row]
    count = round(1 / routed[0]["chance_own"])
    lines += [
        "",
        "## Routers over all LoRA experts at once",
        "",
        f"The {count} LoRA experts together; nobody says which task a prompt is from. Oracle is the",
        f"task's own expert alone. Arrow mixes {TOP_K} experts a token and module, Arrow-1 one.",
        "",
        "| task | base | uniform | Arrow | Arrow-1 | oracle |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(routed, key=lambda row: row["task"]):
        lines.append(
            f"| {row['task']} | {row['base']:.3f} | {row['uniform']:.3f} | {row['arrow']:.3f} | "
            f"{row['arrow_top1']:.3f} | {row['experts'][row['own']]:.3f} |"
        )

    def mean(pick: Any) -> float:
        return sum(pick(row) for row in routed) / len(routed)

    lines += [
        f"| **mean** | {mean(lambda r: r['base']):.3f} | {mean(lambda r: r['uniform']):.3f} | "
        f"{mean(lambda r: r['arrow']):.3f} | {mean(lambda r: r['arrow_top1']):.3f} | "
        f"{mean(lambda r: r['experts'][r['own']]):.3f} |",
        "",
        "## Does Arrow find the expert of the task?",
        "",
        "Arrow's first choice for a prompt is the expert with the most routing weight over its tokens",
        f"and modules (top {TOP_K}). *Own*: it is the expert trained on that task. *Cluster*: it is in",
        f"the same MBC cluster (k = {K}). Beside each, what choosing blindly would give.",
        "",
        "| task | own | chance | cluster | chance | most often chosen |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in sorted(routed, key=lambda row: row["task"]):
        lines.append(
            f"| {row['task']} | {row['first_own']:.1%} | {row['chance_own']:.1%} | "
            f"{row['first_cluster']:.1%} | {row['chance_cluster']:.1%} | {row['most_chosen']} |"
        )
    lines += [
        f"| **mean** | {mean(lambda r: r['first_own']):.1%} | {mean(lambda r: r['chance_own']):.1%} "
        f"| {mean(lambda r: r['first_cluster']):.1%} | {mean(lambda r: r['chance_cluster']):.1%} | |",
        "",
        *_sparse_report(list(done["sparse"].values())),
    ]
    return "\n".join(lines)


def _sparse_report(rows: list[dict[str, Any]]) -> list[str]:
    rows = sorted(rows, key=lambda row: row["task"])

    def first(row: dict[str, Any]) -> float:
        return row["first"].count(row["own"]) / len(row["first"])

    def mean(pick: Any) -> float:
        return sum(pick(row) for row in rows) / len(rows)

    count = rows[0]["experts"]
    return [
        "## The sparse experts among themselves",
        "",
        f"The same with the {count} sparse experts only: exact match of each router, and how often",
        f"Arrow's first choice is the task's own expert (chance {1 / count:.1%}).",
        "",
        "| task | uniform | Arrow | oracle | first choice is own |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {row['task']} | {row['uniform']:.3f} | {row['arrow']:.3f} | {row['oracle']:.3f} | "
            f"{first(row):.1%} |"
            for row in rows
        ),
        f"| **mean** | {mean(lambda r: r['uniform']):.3f} | {mean(lambda r: r['arrow']):.3f} | "
        f"{mean(lambda r: r['oracle']):.3f} | {mean(first):.1%} |",
        "",
    ]


def _kind(expert: Any) -> str:
    if expert.kind == "lora":
        return f"LoRA, rank {expert.rank}"
    block = next(iter(expert.deltas.values())).block
    return "sparse, entries" if block == 1 else f"sparse, {block}x{block} blocks"


if __name__ == "__main__":
    main()
