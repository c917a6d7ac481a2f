"""What `bench papers` makes of its units: order, means, claims, the report, and going on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from adaptlib.errors import ConflictError, NotFoundError, UsageError
from adaptlib.papers import table
from adaptlib.papers.report import WORDS, write
from adaptlib.papers.run import _alone, _check_same, _read, _write, bench
from adaptlib.papers.table import CLAIMS
from adaptlib.papers.units import (
    CONTROLS,
    FEW_SHOT,
    HELD_IN,
    HELD_OUT,
    SYSTEMS,
    Budget,
    Unit,
    needs,
    units,
)
from adaptlib.papers.work import Bench


def summary(found: dict) -> dict:
    return table.summary(found, resamples=200)


def test_each_unit_comes_after_those_that_it_needs() -> None:
    for only in ((), ("phatgoose", "mhr_mu")):
        seen: list[str] = []
        for unit in units(2, only):
            assert all(need.name in seen for need in needs(unit)), unit
            seen.append(unit.name)
        assert len(seen) == len(set(seen))
    assert {unit.what for unit in units(1, ("mhr_mu",))} == {"mhr", "mhr_mu"}
    assert {unit.what for unit in units(1)} >= {*SYSTEMS, *FEW_SHOT}


def test_every_method_has_words_and_every_claim_methods() -> None:
    assert set(WORDS) == {*SYSTEMS, *FEW_SHOT}
    assert {name for _, _, a, b, _ in CLAIMS for name in (a, b)} <= set(WORDS)
    assert set(CONTROLS) <= {*HELD_IN, *HELD_OUT}


def made(better: dict[str, float], seeds: int = 2) -> dict:
    """Hits of every method at random, at a rate of its own."""
    found = {}
    for unit in units(seeds):
        random = np.random.default_rng([unit.seed, *unit.what.encode()])
        tasks = HELD_OUT if unit.kind == "adapt" else (*HELD_IN, *HELD_OUT)
        if unit.what.endswith("oracle"):
            tasks = HELD_IN
        rate = better.get(unit.what, 0.5)
        line = {"unit": unit.name, "seconds": 1.0, "steps": 3}
        if unit.kind != "train":
            rows = {task: (random.random(40) < rate).astype(int) for task in tasks}
            line["hits"] = {task: "".join(map(str, row)) for task, row in rows.items()}
        if unit.what in ("arrow", "mope_example"):
            line["quality"] = {"agreement": 0.5, "entropy": 1.0, "token_entropy": 0.9}
            line["quality"] |= {"used": 7.0, "above": 9, "varied": 1.1, "cost": 1.2}
        found[unit.name] = line
    return found


def test_means_are_over_tasks_and_seeds_without_controls() -> None:
    found = made({})
    row = next(r for r in summary(found)["methods"] if r["method"] == "arrow")
    slow, per_seed = [], {0: [], 1: []}
    for task in HELD_IN:
        if task in CONTROLS:
            continue
        for seed in (0, 1):
            hits = found[f"score-arrow-{seed}"]["hits"][task]
            per_seed[seed].append(hits.count("1") / len(hits))
        slow.append((per_seed[0][-1] + per_seed[1][-1]) / 2)
    assert row["held_in"] == pytest.approx(sum(slow) / len(slow))
    assert row["held_in_seeds"] == pytest.approx([np.mean(per_seed[0]), np.mean(per_seed[1])])
    low, high = row["held_in_interval"]
    assert low < row["held_in"] < high
    assert row["seeds"] == 2
    assert row["agreement"] == 0.5
    oracle = next(r for r in summary(found)["methods"] if r["method"] == "oracle")
    assert oracle["held_out"] is None


def test_a_claim_holds_fails_or_is_not_settled() -> None:
    def of(**better: float) -> dict[str, str]:
        return {c["first"]: c["holds"] for c in summary(made(better))["claims"]}

    assert of(arrow=0.95, oracle=0.95)["arrow"] == "holds"
    assert of(arrow=0.3, oracle=0.9)["arrow"] == "does not"
    assert of(mhr_full=0.9, poly_full=0.2)["mhr_full"] == "holds"
    assert of(mhr_full=0.2, poly_full=0.9)["mhr_full"] == "does not"
    assert of(mope_token=0.9, joint=0.1)["mope_token"] == "does not"
    assert of(mope_token=0.1, joint=0.9)["mope_token"] == "holds"


def test_the_report_is_the_same_bytes_and_says_what_is_missing(tmp_path: Path) -> None:
    whole = summary(made({"mhr": 0.7}))
    for name in ("a.md", "b.md"):
        write(tmp_path / name, whole, Budget())
    text = (tmp_path / "a.md").read_text()
    assert text == (tmp_path / "b.md").read_text()
    for row in (*whole["methods"], *whole["few_shot"]):
        assert f"| {WORDS[row['method']]} |" in text
    assert all(claim["claim"] in text for claim in whole["claims"])
    part = summary({k: v for k, v in made({}).items() if k == "score-base-0"})
    assert part["claims"] == []
    write(tmp_path / "part.md", part, Budget())
    json.dumps(whole)  # plain data


def test_it_goes_on_with_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    at = Bench(tmp_path, tmp_path, "b", HELD_IN, HELD_OUT, Budget())
    _check_same(at)
    _check_same(at)
    with pytest.raises(ConflictError, match="begun with other rows"):
        _check_same(dataclasses.replace(at, budget=Budget(rows=9)))
    unit = Unit("score", "arrow", 0)
    assert _read(tmp_path, unit) is None
    _write(tmp_path, unit, {"hits": {}})
    assert _read(tmp_path, unit) == {"hits": {}}
    with _alone(tmp_path), pytest.raises(ConflictError, match="another process"), _alone(tmp_path):
        pass
    with pytest.raises(NotFoundError, match=r"no file for 1 tasks in .*nowhere\.jsonl"):
        bench(tmp_path, tmp_path, base="b", held_in=["nowhere"], held_out=[])
    with pytest.raises(UsageError, match="seeds and workers"):
        bench(tmp_path, tmp_path, base="b", held_in=[], held_out=[], seeds=0)
