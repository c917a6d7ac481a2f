"""The report on training: its intervals and its verdict."""

import importlib
import random
from pathlib import Path

import numpy as np
import pytest

from adaptlib.demo.units import TASKS, all_units, cluster_units, friendly


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def slow_interval(tasks, resamples):
    """The same, drawing every row."""
    source, means = random.Random(1), []
    for _ in range(resamples):
        drawn = [source.choice(tasks) for _ in tasks]
        means.append(np.mean([np.mean(source.choices(task, k=len(task))) for task in drawn]))
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("kind", ["hits", "differences", "all alike"])
def test_the_bootstrap_is_the_one_that_draws_rows(benchmark, kind):
    random_ = np.random.default_rng(0)
    shares = [[0.1, 0.2, 0.7], [0.0, 0.4, 0.6], [0.3, 0.7, 0.0]]
    if kind == "all alike":
        shares = [[0, 0, 1], [0, 0, 1]]
    tasks = [
        random_.choice([-1, 0, 1], size=n, p=p) for n, p in zip((30, 50, 80), shares, strict=False)
    ]
    if kind == "hits":
        tasks = [abs(task) for task in tasks]
    value, low, high = benchmark("intervals").interval(tasks)
    slow = slow_interval([task.tolist() for task in tasks], 2000)
    assert value == pytest.approx(np.mean([task.mean() for task in tasks]))
    assert [low, high] == pytest.approx(slow, abs=0.02)
    assert low <= value <= high


def test_the_same_numbers_come_out_again(benchmark):
    tasks = [np.array([0, 1, 1]), np.array([0, 0, 1])]
    interval = benchmark("intervals").interval
    assert interval(tasks) == interval(tasks)


@pytest.mark.parametrize(("sparse", "said"), [(0.9, "in all comparisons"), (0.1, "does not hold")])
def test_the_verdict_is_what_the_numbers_say(benchmark, scored, sparse, said):
    tasks = TASKS[:8]
    names = [friendly(task) for task in tasks]
    units = [*all_units(tasks), *cluster_units({"0": names[:3], "1": names[3:]}, tasks)]
    rates = {"base": 0.0, "element-0.1": sparse, "block-0.1": sparse}
    lines = {unit.name: scored(unit, rate=rates.get(unit.method, 0.5)) for unit in units}
    done = benchmark("results").compact(lines)
    text = "\n".join(benchmark("report_training").training_part(done))
    assert said in text
    assert all(f"| {task} |" in text for task in tasks)
    assert "mbc-1" in text


def test_the_report_of_a_run_that_is_not_over(benchmark, scored):
    units = [unit for unit in all_units(TASKS) if unit.method in ("base", "lora")]
    lines = {unit.name: scored(unit) for unit in units[:60]}
    done = benchmark("results").compact(lines)
    text = "\n".join(benchmark("report_training").training_part(done))
    assert "### Hard controls" in text
    assert "full fine-tuning" not in text.split("### Each task")[1].split("### Means")[0]
