"""docs/results-experts.md, from docs/results-training.json (`results.py`), docs/results.json (`bundle.py`) and
docs/results-merging.json (`merging_bundle.py`).

python benchmarks/report.py
"""

import json
from pathlib import Path

from report_merging import merging_part
from report_routing import routing_part
from report_training import training_part

DOCS = Path(__file__).parent.parent / "docs"
TRAINING = DOCS / "results-training.json"
ROUTING = DOCS / "results.json"
MERGING = DOCS / "results-merging.json"


def write_report() -> None:
    """Write what there are numbers for."""
    lines = [
        "# Results: experts, fully trained",
        "",
        "Written by `python benchmarks/report.py`; nobody edits it. Every number is exact match",
        "(greedy, case-insensitive, outer whitespace left out) as measured, one seed.",
        "",
    ]
    if TRAINING.exists():
        lines += training_part(json.loads(TRAINING.read_text()))
    if ROUTING.exists():
        lines += routing_part(json.loads(ROUTING.read_text()))
    if MERGING.exists():
        lines += merging_part(json.loads(MERGING.read_text()))
    (DOCS / "results-experts.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    write_report()
