"""What routers over the bundled experts are worth, on the test splits of the experts' tasks.

    python benchmarks/bundle.py --data DATA [--workers 2] [--rows 200]

`DATA` (or ADAPTLIB_DATA) holds tasks.tar.xz and tasks.json. Writes docs/results.json as it goes, so a
run that was interrupted goes on, and then docs/results.md, whose second part this is.
"""

import argparse
import json
import os
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from report import ROUTING, write_report
from report_routing import TOP_K, K, bundle_digest

FAMILIES = {1: "element-sparse", 16: "block-sparse"}


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


def family(expert: Any) -> str:
    """Which sparse experts an expert is compared with: those of its block size."""
    return FAMILIES[next(iter(expert.deltas.values())).block]


def measure_sparse(folder: Path, own: str, rows: int) -> dict[str, Any]:
    """The same for the sparse experts of one family among themselves, on the task of `own`."""
    import torch

    torch.set_num_threads(1)
    from adaptlib.demo import experts
    from adaptlib.evaluation import exact_match
    from adaptlib.experts.base import DEMO_BASE, load
    from adaptlib.routing import Arrow, Named, Uniform, attach
    from adaptlib.training import read_task

    sparse = {name: e for name, e in experts().items() if e.kind == "sparse"}
    kind, task_name = family(sparse[own]), sparse[own].card["task"]
    sparse = {name: expert for name, expert in sparse.items() if family(expert) == kind}
    task = read_task(folder / f"{task_name}.jsonl")
    model, tokenizer = load(DEMO_BASE)
    result: dict[str, Any] = {
        "task": task_name,
        "own": own,
        "family": kind,
        "experts": len(sparse),
    }
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
    if ROUTING.exists():
        before = json.loads(ROUTING.read_text())
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
                ROUTING.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
                print(f"{result['task']:45} {result['seconds']:6.1f} s", flush=True)
            sparse = {name for name, e in experts().items() if e.kind == "sparse"}
            todo = sorted(sparse - done.setdefault("sparse", {}).keys())
            jobs = [pool.submit(measure_sparse, folder, own, options.rows) for own in todo]
            for job in as_completed(jobs):
                result = job.result()
                done["sparse"][result["own"]] = result
                ROUTING.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    write_report()


if __name__ == "__main__":
    main()
