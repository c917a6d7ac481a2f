"""How much sooner a library is trained side by side than one expert after another.

    python benchmarks/train_library.py [--tasks 16] [--rows 300]

Makes tasks of its own (say the n-th of five words), and times `adaptlib train-library` on the
bundled base with one worker and with as many as there are cores, into fresh libraries, start to
finish. The experts must be the same to the last byte.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "stone",
    "river",
    "window",
    "garden",
    "letter",
    "winter",
    "candle",
    "bridge",
    "market",
    "forest",
    "silver",
    "harbour",
]


def write_tasks(folder: Path, count: int, rows: int) -> None:
    folder.mkdir()
    listing = []
    for number in range(count):
        draw = random.Random(number)
        lines = []
        for i in range(rows):
            words = draw.sample(WORDS, 5)
            split = "valid" if i % 10 == 0 else "train"
            lines.append({"split": split, "input": " ".join(words), "output": words[number % 5]})
        name = f"word_{number:02}"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
        listing.append({"name": name, "instruction": f"Say word {number % 5 + 1} of five."})
    (folder.parent / "tasks.json").write_text(json.dumps(listing))


def run(folder: Path, library: Path, workers: int) -> tuple[float, list[str]]:
    command = [str(Path(sys.executable).parent / "adaptlib"), "train-library", str(folder)]
    command += ["-L", str(library), "--base", "adaptlib/demo-base", "--workers", str(workers)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, sorted(entry["digest"] for entry in json.loads(done.stdout)["trained"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    adaptlib = Path(sys.executable).parent / "adaptlib"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_tasks(place / "tasks", args.tasks, args.rows)
        results = {}
        for workers in (1, cores or 1):
            library = place / f"library-{workers}"
            subprocess.run([adaptlib, "init", str(library), "-q"], check=True, capture_output=True)
            results[workers] = run(place / "tasks", library, workers)
    (alone, one), (together, many) = results[1], results[cores or 1]
    print(f"{args.tasks} LoRA experts of {args.rows} rows, 5 epochs, {cores} cores")
    print(f"one worker   {alone:6.1f} s")
    print(f"{cores} workers    {together:6.1f} s   {alone / together:.2f} x")
    print("the same bytes" if one == many else "DIFFERENT BYTES")
    if one != many:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
