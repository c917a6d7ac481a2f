"""An evaluation as a figure and as a page: the same bytes, nothing lost, nothing that runs."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptlib.errors import UsageError
from adaptlib.evaluation import plot, report


def document(routers: int = 4, tasks: int = 5, name: str = "router") -> dict:
    random = np.random.default_rng(0)
    results, rows, comparisons, quality = [], [], [], {}
    labels = ["base", "oracle", *(f"{name}-{i}" for i in range(routers))]
    for label in labels:
        values = random.random(tasks)
        for i, value in enumerate(values):
            results.append(
                {"router": label, "task": f"task-{i}", "metric": "exact_match", "value": value}
            )
        mean = float(values.mean())
        rows.append(
            {"router": label, "metric": "exact_match", "tasks": tasks, "value": mean}
            | {"low": mean - 0.1, "high": mean + 0.1, "oracle_share": 0.5, "regret": None}
        )
        if label != "base":
            comparisons.append(
                {"a": label, "b": "base", "metric": "exact_match", "difference": 0.1, "p": 0.03}
                | {"better": 3, "worse": 1, "low": 0.0, "high": 0.2, "tasks": tasks, "equal": 1}
            )
        if label.startswith(name):
            quality[label] = {
                "agreement": 0.5, "entropy": 1.0, "token_entropy": 0.5, "used": 9.0,
                "varied": 1.0 if label.endswith("0") else 5.0, "cost": 1.2,
                "shares": {"a": 0.5, "b": 0.3, "c": 0.2},
                "confusion": [
                    {"own": "a", "expert": "b", "n": 3}, {"own": "a", "expert": None, "n": 1},
                ],
            }  # fmt: skip
    return {
        "results": results, "routers": rows, "comparisons": comparisons, "quality": quality,
        "notes": ["a note"], "oracle": {},
    }  # fmt: skip


@pytest.mark.parametrize(("routers", "tasks"), [(1, 1), (15, 40)])
def test_a_figure_is_the_same_bytes_and_has_every_name(
    tmp_path: Path, routers: int, tasks: int
) -> None:
    for name in ("a.svg", "b.svg"):
        plot.draw(tmp_path / name, document(routers, tasks))
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for row in document(routers, tasks)["routers"]:
        assert f">{row['router']}</text>" in text
        assert f">{row['value']:.3f}</text>" in text
    ElementTree.fromstring(text)
    plot.draw(tmp_path / "a.png", document(routers, tasks))
    with pytest.raises(UsageError):
        plot.draw(tmp_path / "a.pdf", document())


def test_a_page_has_every_number_and_says_what_collapsed(tmp_path: Path) -> None:
    made = document(15, 40)
    for name in ("a.html", "b.html"):
        report.write(tmp_path / name, made)
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    for row in made["results"]:
        assert f">{row['value']:.3f}</td>" in text
    assert text.count("collapsed: nearly the same") == 2  # of router-0 and router-10
    assert "a note" in text
    assert "<script" not in text
    assert "style-src 'sha256-" in text
    assert "style=" not in text
    with pytest.raises(UsageError, match=r"an \.html file"):
        report.write(tmp_path / "a.txt", made)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    made = document(2, 2, name='<img src=x onerror="alert(1)">&')
    made["notes"] = ["</style><script>alert(1)</script>"]
    report.write(tmp_path / "a.html", made)
    text = (tmp_path / "a.html").read_text()
    assert "<img" not in text
    assert "<script" not in text
    assert "&lt;img src=x" in text
    plot.draw(tmp_path / "a.svg", document(2, 2, name="$\\frac{a}{b}$ <b>"))
