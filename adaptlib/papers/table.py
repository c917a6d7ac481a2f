"""From what the units found to one row a method, and to the claims of the papers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptlib.evaluation.statistics import RESAMPLES, interval, paired
from adaptlib.papers.units import CONTROLS, FEW_SHOT, HELD_IN, HELD_OUT, SYSTEMS

Hits = dict[str, np.ndarray]  # by task, for each test row the share of seeds that answer it

# (what the papers find, group of tasks, a, b): the claim is that a is above b, or at least it
CLAIMS: tuple[tuple[str, str, str, str, str], ...] = (
    ("Arrow is near the oracle on held-in tasks (arXiv:2405.11157)", "held_in", "arrow", "oracle", "near"),
    ("MBC + Arrow is at least joint training on held-out tasks (arXiv:2405.11157)", "held_out", "mbc_arrow", "joint", "least"),
    ("Merged sparse experts are above merged LoRA on held-in tasks (arXiv:2507.07140)", "held_in", "sparse_merge", "merge_linear", "above"),
    ("MHR is above Polytropon on new tasks (arXiv:2211.03831)", "few_shot", "mhr_full", "poly_full", "above"),
    ("MHR is above Polytropon on the tasks that both were trained on (arXiv:2211.03831)", "held_in", "mhr", "poly", "above"),
    ("Skills by task are above one joint adapter on held-in tasks (arXiv:2202.13914, 2211.03831)", "held_in", "mhr", "joint", "above"),
    ("MHR-z is above Polytropon-z on new tasks (arXiv:2211.03831)", "few_shot", "mhr_z", "poly_z", "above"),
    ("MHR-μ is as good as MHR on new tasks (arXiv:2211.03831)", "few_shot", "mhr_mu", "mhr_full", "least"),
    ("A mixture has no consistent gain over one adapter on held-out tasks (MoPE case study)", "held_out", "mope_token", "joint", "none"),
    ("PHATGOOSE is above Arrow on held-in tasks (arXiv:2402.05859; tutorial of mttl)", "held_in", "phatgoose", "arrow", "above"),
    ("SpectR is above Arrow on held-in tasks (arXiv:2504.03454)", "held_in", "spectr", "arrow", "above"),
    ("Routing trained on Arrow's scores is above Arrow on held-in tasks (ours)", "held_in", "arrow_tuned", "arrow", "above"),
)  # fmt: skip
COLLAPSED = (
    1.5  # as many different mixtures as prompts of 26 tasks get, where routing has collapsed
)
MARGIN = 0.05  # "near" and "at least" allow this much


def summary(
    found: Mapping[str, Mapping[str, Any]], *, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Everything that the report and `--json` say, as plain data: `methods`, `few_shot`, `claims`.

    Means are over tasks, each counting alike; intervals are percentile intervals of a bootstrap
    over tasks and rows. Hard controls are in no mean.
    """
    groups = {
        "held_in": [task for task in HELD_IN if task not in CONTROLS],
        "held_out": [task for task in HELD_OUT if task not in CONTROLS],
    }
    scored = {name: lines for name in SYSTEMS if (lines := _lines(found, "score", name))}
    adapted = {name: lines for name in FEW_SHOT if (lines := _lines(found, "adapt", name))}
    methods = [_method(name, lines, groups, resamples) for name, lines in scored.items()]
    few = [
        _method(name, lines, {"few_shot": groups["held_out"]}, resamples)
        for name, lines in adapted.items()
    ]
    training = {
        str(line["unit"]).removeprefix("train-"): {
            "steps": line["steps"], "seconds": line["seconds"],
        }
        for line in found.values()
        if str(line["unit"]).startswith("train-")
    }  # fmt: skip
    hits = {name: _hits(lines) for name, lines in (scored | adapted).items()}
    claims = [_claim(claim, hits, groups, resamples) for claim in CLAIMS]
    return {
        "methods": methods,
        "few_shot": few,
        "claims": [claim for claim in claims if claim is not None],
        "collapse": {
            row["method"]: {key: row[key] for key in ("entropy", "used", "varied")}
            | {"collapsed": row["varied"] < COLLAPSED}
            for row in methods
            if row["method"].startswith("mope") and row["varied"] is not None
        },
        "training": training,
        "tasks": _by_task(scored, [*HELD_IN, *HELD_OUT]),
    }


def _lines(found: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> list[Mapping[str, Any]]:
    """What each seed found."""
    prefix = f"{kind}-{name}-"
    return [line for unit, line in found.items() if unit.rpartition("-")[0] + "-" == prefix]


def _hits(lines: Sequence[Mapping[str, Any]]) -> Hits:
    tasks = lines[0]["hits"]
    return {
        task: np.mean([[int(c) for c in line["hits"][task]] for line in lines], axis=0)
        for task in tasks
    }


def _method(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    resamples: int,
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "seeds": len(lines)}
    hits = _hits(lines)
    for group, tasks in groups.items():
        values = [hits[task] for task in tasks if task in hits]
        if not values:
            row |= {group: None, f"{group}_interval": None, f"{group}_seeds": None}
            continue
        mean, low, high = interval(values, resamples=resamples)
        each = [
            float(np.mean([np.mean([int(c) for c in line["hits"][t]]) for t in tasks if t in hits]))
            for line in lines
        ]
        row |= {group: mean, f"{group}_interval": [low, high], f"{group}_seeds": each}
    known = [line["quality"] for line in lines if "quality" in line]
    for key in ("agreement", "entropy", "token_entropy", "used", "above", "varied", "cost"):
        values = [one[key] for one in known if one.get(key) is not None]
        row[key] = float(np.mean(values)) if values else None
    row["seconds"] = float(np.mean([line["seconds"] for line in lines]))
    return row


def _claim(
    claim: tuple[str, str, str, str, str],
    hits: Mapping[str, Hits],
    groups: Mapping[str, Any],
    resamples: int,
) -> dict[str, Any] | None:
    text, group, a, b, kind = claim
    if a not in hits or b not in hits:
        return None
    tasks = groups["held_out" if group == "few_shot" else group]
    tasks = [task for task in tasks if task in hits[a] and task in hits[b]]
    one, other = ([hits[name][task] for task in tasks] for name in (a, b))
    found = paired(one, other, resamples=resamples, permutations=resamples)
    values = {"a": float(np.mean([v.mean() for v in one]))}
    values |= {"b": float(np.mean([v.mean() for v in other]))}
    if kind == "above":
        holds = "holds" if found.low > 0 else "does not" if found.difference <= 0 else "not settled"
    elif kind == "none":
        holds = "does not" if found.low > 0 else "holds"
    else:
        short = found.difference < -MARGIN
        holds = "does not" if short else "holds" if found.low >= -MARGIN else "not settled"
    return {
        "claim": text, "tasks": len(tasks), "first": a, "second": b, **values,
        "difference": found.difference, "low": found.low, "high": found.high, "p": found.p,
        "holds": holds,
    }  # fmt: skip


def _by_task(
    scored: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    every = {name: _hits(lines) for name, lines in scored.items()}
    return {
        task: {name: float(hits[task].mean()) for name, hits in every.items() if task in hits}
        for task in tasks
    }
