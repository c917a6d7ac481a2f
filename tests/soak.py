"""How much of the long tests to run, and where their figures go.

`make test` runs each of them once over; `make soak` sets ADAPTLIB_SOAK to a larger factor and
ADAPTLIB_SOAK_REPORT to a file, which gets one JSON line of figures from each test.
"""

import json
import os
from pathlib import Path

FACTOR = max(1, int(os.environ.get("ADAPTLIB_SOAK", "1")))


def report(name: str, **figures: float | str) -> None:
    """One line of figures: on the screen, and in the report where there is one."""
    line = json.dumps({"test": name, "factor": FACTOR, **figures})
    print(line)
    if where := os.environ.get("ADAPTLIB_SOAK_REPORT"):
        with Path(where).open("a") as file:
            file.write(line + "\n")
