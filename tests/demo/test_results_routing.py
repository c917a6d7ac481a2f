"""The report on routing: its words follow its numbers."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def results(report, texts):
    """Two tasks of 20 rows, where Arrow has half of them right and text routers have `texts`."""
    half, asked = "01" * 10, {"own": "01" * 10, "cluster": 0.5, "most": "one"}
    hits = {label: texts if label in report.TEXTS else half for label in report.TITLES}
    row = {
        "task": "first",
        "own": "one",
        "experts": 2,
        "chance_cluster": 0.5,
        "hits": hits,
        "held": dict.fromkeys(report.TITLES, half),
        "first": {form: dict.fromkeys(report.ASKED, asked) for form in report.FORMS},
        "majority": 0.5,
        "most": {"loraretriever": "one"},
    }
    other = {"refused": 0.5, "separation": 0.5}
    threshold = {"kept": 0.9, "tasks": other, "text": other, "ms": 1.0, "ms_base": 1.0}
    threshold["prompts"] = {"valid": 1, "test": 1, "tasks": 1, "text": 1}
    both = {"first": row, "second": {**row, "task": "second"}}
    return {"bundle": "", "rows": 20, "tasks": both, "unseen": both, "sparse": {}} | {
        "thresholds": {"arrow": threshold, "tp": threshold}
    }


@pytest.mark.parametrize(
    ("texts", "holds", "word"),
    [
        ("1" * 20, "**That holds here**", "above"),
        ("0" * 20, "**That does not hold here**", "below"),
        ("01" * 10, "**That does not hold here**", "not told apart from"),
    ],
)
def test_the_verdict_is_what_the_numbers_say(benchmark, texts, holds, word):
    report, part = benchmark("report_routers"), benchmark("report_routing").routing_part
    text = "\n".join(part(results(report, texts)))
    assert holds in text
    assert f"is **{word}** Arrow, top 4" in text
    assert "an earlier bundle" in text
    assert all(f"| {title} |" in text for title in report.TITLES.values())


def test_the_report_of_a_run_that_is_not_over(benchmark):
    report, part = benchmark("report_routers"), benchmark("report_routing").routing_part
    done = results(report, "01" * 10)
    done |= {"unseen": {}, "thresholds": {}}
    assert "Routers over all LoRA experts" in "\n".join(part(done))
    assert "Routing on the bundle" in "\n".join(part({**done, "tasks": {}}))


def test_tables_fit(benchmark):
    report, part = benchmark("report_routers"), benchmark("report_routing").routing_part
    lines = part(results(report, "1" * 20))
    assert max(len(line) for line in lines if line.startswith("|")) <= 120
