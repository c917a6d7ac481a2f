"""Which of the experts that `make` trained go into the bundle, and how they get there."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptlib.demo.units import KEEP_RATIOS, TASKS, base_name

LIMIT = 60_000_000  # bytes of the whole bundle
MARGIN = 0.05  # exact match that a task's expert needs above the floor; see `worth_it`
POOLED = ("joint", "mbc")
SPARSE = 8  # tasks, the first, whose sparse experts are bundled: a demo is not to be slow
# What is smaller comes first, so that of the large ones there are as many as fit.
METHODS = ("lora", f"block-{KEEP_RATIOS[0]}", f"element-{KEEP_RATIOS[0]}")


def worth_it(line: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a task's expert learned something, and the numbers: exact match of it, and of the
    base, its likeliest label or the commonest answer, whichever is highest. All of the validation
    split: the test split is for reporting, and chooses nothing."""
    (task,) = line["spec"]["tasks"]
    floor = max(
        base["scores"][task]["valid"]["value"],
        base["label"].get("valid", 0.0),
        base["majority"]["valid"],
    )
    value = line["scores"][task]["valid"]["value"]
    return value >= floor + MARGIN, f"{value:.3f}, floor {floor:.3f}"


def choose(
    lines: Sequence[Mapping[str, Any]], base_bytes: int, *, limit: int = LIMIT
) -> tuple[list[str], list[str], list[str]]:
    """Names of the tasks' experts and of the pooled ones (joint, clusters) to bundle, and a
    sentence for each that is not.

    Pooled experts always go in, the others where they are `worth_it` and, element-sparse ones in
    the order of their tasks, while there is room. Raises SystemExit where the rest alone is above
    `limit` bytes.
    """
    lines = sorted(lines, key=lambda line: TASKS.index(line["spec"]["tasks"][0]))
    by_name = {line["name"]: line for line in lines}
    pooled = [line["name"] for line in lines if line["method"] in POOLED]
    total = base_bytes + sum(by_name[name]["bytes"] for name in pooled)
    chosen, said = [], []
    for method in METHODS:
        for line in lines:
            (task,) = line["spec"]["tasks"] if line["method"] == method else (None,)
            if task is None or (method != "lora" and task not in TASKS[:SPARSE]):
                continue
            good, numbers = worth_it(line, by_name[base_name(line["spec"]["tasks"][0])])
            if not good:
                said.append(f"dropped {line['name']}: {numbers}")
                continue
            if total + line["bytes"] > limit:
                if method != METHODS[-1]:
                    raise SystemExit(
                        f"the bundle would have more than {limit / 1e6:.0f} MB with {line['name']}"
                    )
                said.append(f"no room for {line['name']}")
                continue
            total += line["bytes"]
            chosen.append(line["name"])
    if total > limit:
        raise SystemExit(f"the bundle would have {total / 1e6:.1f} MB without any task's expert")
    return chosen, pooled, said


def install(
    out: Path, base: Path, lines: Sequence[Mapping[str, Any]], bundle: Path, *, limit: int = LIMIT
) -> str:
    """Put the base model and the chosen experts into `bundle`, in place of those there, and say
    what was done. Tasks' experts go into `experts/`, which the demo reads; the joint one and the
    clusters' into `pooled/`."""
    files = [file for file in base.iterdir() if file.is_file()]
    names, pooled, said = choose(lines, sum(file.stat().st_size for file in files), limit=limit)
    there = base.resolve() == (bundle / "base").resolve()  # then it stays
    for part in ("experts", "pooled") if there else ("base", "experts", "pooled"):
        shutil.rmtree(bundle / part, ignore_errors=True)
        (bundle / part).mkdir(parents=True)
    for file in () if there else files:
        shutil.copyfile(file, bundle / "base" / file.name)
    for part, chosen in (("experts", names), ("pooled", pooled)):
        for name in chosen:
            shutil.copytree(out / "experts" / name, bundle / part / name)
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    return "\n".join(
        [*said, f"{len(names)} + {len(pooled)} experts, {size / 1e6:.1f} MB in {bundle}"]
    )
