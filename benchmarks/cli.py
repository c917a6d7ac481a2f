"""How long the command line takes to answer, each command as a process of its own.

    python benchmarks/cli.py [--runs 7]

Budgets: --version 0.15 s, --help 0.4 s, list of 1,000 experts 0.5 s, route on the bundle 12 s.
The first run of each is shown apart: it finds the disk cache cold at best.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUDGETS = {"--version": 0.15, "--help": 0.4, "list": 0.5, "route": 12.0}


def fill(library: Path, count: int) -> None:
    """A library of `count` small experts, all different."""
    import numpy as np

    from adaptlib.experts import Library
    from adaptlib.experts.codec import Module, Packed
    from adaptlib.experts.tensors import RawTensor

    rng = np.random.default_rng(0)
    opened = Library.open(library, create=True)
    for i in range(count):
        modules = {f"model.layers.{layer}.q_proj": Module((8, 8), 2, 1.0) for layer in range(6)}
        tensors = {
            f"{module}.{part}": RawTensor(
                "F32", shape, memoryview(rng.normal(size=shape).astype("<f4")).cast("B")
            )
            for module in modules
            for part, shape in (("lora_a", (2, 8)), ("lora_b", (8, 2)))
        }
        opened.add(Packed("lora", "some/base", modules, tensors, {"task": f"task {i}"}), f"e{i}")


def seconds(arguments: list[str], runs: int) -> list[float]:
    command = [str(Path(sys.executable).with_name("adaptlib")), *arguments]
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        thousand, demo = Path(scratch) / "thousand", Path(scratch) / "demo"
        fill(thousand, 1000)
        seconds(["init", str(demo), "--demo"], 1)
        prompt = "Name the intent of the request.\nInput: my card was declined\nAnswer:"
        commands = {
            "--version": ["--version"],
            "--help": ["--help"],
            "list": ["list", "-L", str(thousand)],
            "route": ["route", "-L", str(demo), "--prompt", prompt],
        }
        print(
            f"{'command':12} {'first':>7} {'median':>7} {'slowest':>7} {'budget':>7}   {os.cpu_count()} cores"
        )
        for label, arguments in commands.items():
            times = seconds(arguments, options.runs)
            print(
                f"{label:12} {times[0]:6.3f}s {statistics.median(times):6.3f}s {max(times):6.3f}s "
                f"{BUDGETS[label]:6.2f}s"
            )


if __name__ == "__main__":
    main()
