"""What routers over the bundled experts are worth, on the test splits of the experts' tasks.

    python benchmarks/bundle.py --data DATA [--workers 2] [--rows 100]

`DATA` (or ADAPTLIB_DATA) holds tasks.tar.xz, tasks.json and text/. Writes docs/results.json as it goes,
so a run that was interrupted goes on, and then docs/results-experts.md, whose second part this is.
"""

import argparse
import json
import os
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bundle_thresholds import THRESHOLDS, measure_threshold
from report import ROUTING, write_report
from report_routers import TOP_K
from report_routing import K, bundle_digest

FORM = 2  # of docs/results.json: results of another form are not mixed in
FAMILIES = {1: "element-sparse", 16: "block-sparse"}


def unpack(data: Path, where: Path) -> Path:
    """The task files, unpacked beside their listing; the folder with one .jsonl a task."""
    with tarfile.open(data / "tasks.tar.xz") as archive:
        archive.extractall(where, filter="data")
    folder = next(where.rglob("*.jsonl")).parent
    (folder / "tasks.json").write_bytes((data / "tasks.json").read_bytes())
    return folder


def measure_task(folder: Path, task_name: str, rows: int, before: dict[str, Any]) -> dict[str, Any]:
    """Hits of every router on one task, with and without the task's own expert, and first choices;
    what is there from before is not measured again."""
    from bundle_routers import (
        ASKED,
        ASKED_TEXTS,
        bench,
        first_choices,
        forms,
        hits,
        paraphrase,
        routed_hits,
        routers,
        without,
    )

    from adaptlib.routing import Named
    from adaptlib.training import read_task

    at, task = bench(folder), read_task(folder / f"{task_name}.jsonl")
    own = next(name for name, expert in at.loras.items() if expert.card["task"] == task_name)
    found, held, first = (dict(before.get(part, {})) for part in ("hits", "held", "first"))
    if "base" not in found:
        alone = {own: at.loras[own]}
        found["base"] = hits(at.model, at.tokenizer, task, rows)
        found["oracle"] = routed_hits(at, alone, Named.fit(alone, expert=own), task, rows)
    every = routers(folder)
    for label, router in every.items():
        if label not in found and not label.endswith("_bare"):
            found[label] = routed_hits(at, at.loras, router, task, rows)
    others = {name: expert for name, expert in at.loras.items() if name != own}
    for label, make in without(folder, own).items():
        if label not in held:
            held[label] = routed_hits(at, others, make(), task, rows)
    cluster = next(members for members in clusters(folder) if own in members)
    for form, texts in forms(task, task.split("test")[:rows]).items():
        there = first[form] = dict(first.get(form, {}))
        if form != "trained":
            texts = texts[: rows // 2]
        for label in (*ASKED, *ASKED_TEXTS):
            if label in there or (label == "random" and form != "trained"):
                continue
            chosen = first_choices(at.model, at.tokenizer, texts, at.loras, every[label])
            there[label] = {
                "own": "".join(str(int(name == own)) for name in chosen),
                "cluster": sum(name in cluster for name in chosen) / len(chosen),
                "most": max(sorted(set(chosen)), key=chosen.count),
            }
    return {
        "task": task_name,
        "category": task.category,
        "own": own,
        "experts": len(at.loras),
        "chance_cluster": len(cluster) / len(at.loras),
        "paraphrase": paraphrase(task),
        "hits": found,
        "held": held,
        "first": first,
    }


@cache
def clusters(folder: Path) -> list[tuple[str, ...]]:
    from bundle_routers import bench

    from adaptlib.clustering import mbc

    loras = bench(folder).loras
    return list(mbc(loras, k=min(K, len(loras))).values())


def measure_unseen(
    folder: Path, task_name: str, rows: int, before: dict[str, Any]
) -> dict[str, Any]:
    """Hits on a task that no expert was trained on, with all LoRA experts there."""
    from bundle_routers import UNSEEN, bench, first_choices, hits, routed_hits, routers

    from adaptlib.training import read_task

    at, task = bench(folder), read_task(folder / f"{task_name}.jsonl")
    test = [row.output.strip().casefold() for row in task.split("test")[:rows]]
    found, most = (dict(before.get(part, {})) for part in ("hits", "most"))
    if "base" not in found:
        found["base"] = hits(at.model, at.tokenizer, task, rows)
    every = routers(folder)
    for label in UNSEEN:
        if label not in found:
            found[label] = routed_hits(at, at.loras, every[label], task, rows)
    texts = [task.prompt(row) for row in task.split("test")[:rows]]
    for label in ("arrow_prompt1", "loraretriever"):
        if label not in most:
            chosen = first_choices(at.model, at.tokenizer, texts, at.loras, every[label])
            most[label] = max(sorted(set(chosen)), key=chosen.count)
    return {
        "task": task_name,
        "majority": max(map(test.count, test)) / len(test),
        "hits": found,
        "most": most,
    }


def family(expert: Any) -> str:
    """Which sparse experts an expert is compared with: those of its block size."""
    return FAMILIES[next(iter(expert.deltas.values())).block]


def measure_sparse(folder: Path, own: str, rows: int, before: dict[str, Any]) -> dict[str, Any]:
    """The same for the sparse experts of one family among themselves, on the task of `own`."""
    if before:
        return before
    import torch

    torch.set_num_threads(1)
    from bundle_routers import first_choices

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
    texts = [task.prompt(row) for row in task.split("test")[:rows]]
    result["first"] = first_choices(model, tokenizer, texts, sparse, routers["arrow"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ADAPTLIB_DATA"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    if options.data is None:
        raise SystemExit("say where the tasks are: --data DIR, or ADAPTLIB_DATA")
    from adaptlib.demo import experts

    held, data = experts(), Path(options.data)
    tasks = sorted({expert.card["task"] for expert in held.values() if expert.kind == "lora"})
    sparse = sorted(name for name, expert in held.items() if expert.kind == "sparse")
    listing = json.loads((data / "tasks.json").read_text())
    unseen = sorted(task["name"] for task in listing if task["role"] == "held_out")
    done: dict[str, Any] = {"bundle": bundle_digest(), "rows": options.rows, "form": FORM}
    if ROUTING.exists():
        before = json.loads(ROUTING.read_text())
        if all(before.get(key) == done[key] for key in done):
            done = before
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        folder = unpack(data, Path(scratch))
        parts: list[tuple[str, Any, list[str]]] = [
            ("tasks", measure_task, tasks),
            ("unseen", measure_unseen, unseen),
            ("thresholds", partial(measure_threshold, data=data), list(THRESHOLDS)),
            ("sparse", measure_sparse, sparse),
        ]
        for part, measure, names in parts:
            there = done.setdefault(part, {})
            jobs = {
                pool.submit(measure, folder, name, options.rows, there.get(name, {})): name
                for name in names
            }
            for job in as_completed(jobs):
                there[jobs[job]] = job.result()
                ROUTING.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
                print(f"{part:10} {jobs[job]}", flush=True)
    write_report()


if __name__ == "__main__":
    main()
