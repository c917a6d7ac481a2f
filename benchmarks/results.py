"""docs/results-training.json and the first part of docs/results-experts.md, from what training gave.

    python benchmarks/results.py --scores OUT/scores.jsonl

`OUT` is the folder of `python -m adaptlib.demo.make`. For each task and method the JSON has the hits
on the test split, row by row, so everything in the report can be computed from it again.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import TRAINING, write_report

from adaptlib.demo.make import read_lines
from adaptlib.demo.units import CONTROLS, TASKS, base_name


def compact(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the report is made of: hits by task and method, the clusters, and the costs by method."""
    trained = [line for line in lines.values() if line["method"] != "base"]
    names = [task for task in TASKS if base_name(task) in lines]
    tasks = {}
    for name in names:
        base = lines[base_name(name)]
        tests = {
            line["method"]: line["scores"][name]["test"]["hits"]
            for line in trained
            if name in line["scores"]
        }
        tasks[name] = {
            "category": base["category"],
            "control": name in CONTROLS,
            "n": base["scores"][name]["test"]["n"],
            "label": base["label"].get("test"),
            "majority": base["majority"]["test"],
            "hits": {"base": base["scores"][name]["test"]["hits"], **tests},
        }
    clusters = {
        line["name"]: {key: line[key] for key in ("examples", "steps", "train_seconds")}
        | {"tasks": line["spec"]["tasks"], "best_epoch": line["best_epoch"]}
        for line in sorted(trained, key=lambda line: line["name"])
        if line["method"] == "mbc"
    }
    return {"tasks": tasks, "clusters": clusters, "methods": _methods(trained)}


def _methods(trained: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recipe and cost of each method: sums of steps and tokens, seconds of undisturbed trainings."""
    found = {}
    for method in dict.fromkeys(line["method"] for line in trained):
        lines = [line for line in trained if line["method"] == method]
        seconds = [line["train_seconds"] for line in lines if not line["resumed"]]
        sizes = [line["bytes"] for line in lines if "bytes" in line]
        spec = lines[0]["spec"]
        found[method] = {
            key: spec[key] for key in ("epochs", "lr", "keep_ratio", "block", "rank")
        } | {
            "experts": len(lines),
            "params": lines[0]["params"],
            "bytes": round(sum(sizes) / len(sizes)) if sizes else None,
            "steps": sum(line["steps"] for line in lines),
            "tokens": sum(line["tokens"] for line in lines),
            "seconds_each": round(sum(seconds) / len(seconds), 1) if seconds else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scores", type=Path, required=True)
    args = parser.parse_args()
    lines = read_lines(args.scores)
    if not lines:
        raise SystemExit(f"there are no scores in {args.scores}")
    TRAINING.write_text(json.dumps(compact(lines), indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()
