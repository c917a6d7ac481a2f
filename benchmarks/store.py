"""The store against its floors, each side by side in one run.

    python benchmarks/store.py [--only add,memory,verify,list,start] [--runs 7] [--experts 10000]

add      at most 1.5 x the time of `cp` and `sha256sum` of the same file. These read each byte twice
         and write it once; `add` reads it three times (NaN, hash, sketch), writes it once, and waits
         until it is on the disk (fsync), which `cp` does not: `cp` with `sync` is shown as well.
memory   flat in the size of the adapter: the peak of a process that adds 50, 200 and 800 MB.
verify   at least 1.2 GB/s, or the speed of `sha256sum` of the same files if that is lower.
list     of 10,000 experts in at most .3 s, as a process; making the index anew in at most 10 s.
start    `adaptlib --version` in at most .1 s.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ADAPTLIB = str(Path(sys.executable).with_name("adaptlib"))
# Without what keeps Python from keeping compiled modules, or from gathering what it writes.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
_ADDS = """
import sys
from pathlib import Path
from adaptlib.experts import Library
library = Library.open(sys.argv[1], create=True)
if sys.argv[2:]:
    library.add(sys.argv[2], "expert")
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def make_adapter(directory: Path, megabytes: float, seed: int = 0) -> Path:
    """A PEFT adapter of a model of width 2048: rank 16, as many layers as it takes, float32."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    rank, width = 16, 2048
    layers = max(1, round(megabytes * 1e6 / (4 * 4 * 2 * rank * width)))
    tensors = {}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for layer in range(layers):
        for name in names:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, width)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(width, rank)).astype(np.float32)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": rank,
        "lora_alpha": 32,
        "target_modules": list(names),
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def shell(command: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        command,
        shell=True,
        check=True,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def in_turn(sides: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """The median time of each side, all of them run in turn."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, run in sides.items():
            times[side].append(run())
    return {side: statistics.median(values) for side, values in times.items()}


def say(label: str, figure: str, budget: str, holds: bool) -> None:
    print(f"  {label:38} {figure:>24}   budget {budget:18} {'holds' if holds else 'MISSED'}")


def add(scratch: Path, options: argparse.Namespace) -> None:
    from adaptlib.experts import Library

    source = make_adapter(scratch / "adapter", options.megabytes)
    weights = source / "adapter_model.safetensors"
    size = weights.stat().st_size / 1e6
    where, copy = scratch / "library", scratch / "copy"
    shell(f"sha256sum {weights}")  # it is in the page cache for all sides

    def in_process() -> float:
        library = Library.open(where, create=True)
        started = time.perf_counter()
        library.add(source, "expert")
        elapsed = time.perf_counter() - started
        shutil.rmtree(where)
        return elapsed

    def command() -> float:
        Library.open(where, create=True)
        elapsed = shell(f"{ADAPTLIB} add {source} --name expert -L {where}")
        shutil.rmtree(where)
        return elapsed

    floor = "cp + sha256sum"
    medians = in_turn(
        {
            floor: lambda: shell(f"cp {weights} {copy} && sha256sum {copy}; rm {copy}"),
            "cp + sync + sha256sum": lambda: shell(
                f"cp {weights} {copy} && sync {copy} && sha256sum {copy}; rm {copy}"
            ),
            "library.add": in_process,
            "adaptlib add": command,
        },
        options.runs,
    )
    print(f"add: {size:.0f} MB, medians of {options.runs}, in turn")
    for side, seconds in medians.items():
        ratio = seconds / medians[floor]
        figure = f"{seconds:.3f} s {size / seconds:5.0f} MB/s {ratio:5.2f}x"
        say(side, figure, "1.5x" if "add" in side else "", ratio <= 1.5 or "add" not in side)


def memory(scratch: Path, options: argparse.Namespace) -> None:
    def peak(*arguments: str) -> float:
        command = [sys.executable, "-c", _ADDS, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True).stdout) / 1000

    print("memory: the peak of a process that adds, above that of one that opens a library")
    idle = peak(str(scratch / "empty"))
    peaks = {}
    for megabytes in (50, 200, 800):
        source = make_adapter(scratch / f"adapter-{megabytes}", megabytes)
        peaks[megabytes] = peak(str(scratch / "library"), str(source)) - idle
        shutil.rmtree(source)
        shutil.rmtree(scratch / "library")
    for megabytes, above in peaks.items():
        say(f"an adapter of {megabytes} MB", f"{above:.0f} MB", "50 MB for any", above <= 50)


def verify(scratch: Path, options: argparse.Namespace) -> None:
    from adaptlib.experts import Library

    library = Library.open(scratch / "library", create=True)
    for number, megabytes in enumerate((4, 4, 4, 4, 16, 16, 64, 128, 256)):
        source = make_adapter(scratch / "adapter", megabytes, seed=number)
        library.add(source, f"e{number}")
        shutil.rmtree(source)
    files = [str(path) for path in (scratch / "library/objects").rglob("*") if path.is_file()]
    size = sum(Path(path).stat().st_size for path in files) / 1e9

    def verified() -> float:
        started, cpu = time.perf_counter(), time.process_time()
        assert library.verify().ok
        spent.append((time.process_time() - cpu) / (time.perf_counter() - started))
        return time.perf_counter() - started

    spent: list[float] = []
    medians = in_turn(
        {
            "sha256sum": lambda: shell("sha256sum " + " ".join(files)),
            "library.verify": verified,
            "adaptlib verify": lambda: shell(f"{ADAPTLIB} verify -L {scratch / 'library'}"),
        },
        options.runs,
    )
    print(f"verify: {len(files)} objects, {size:.2f} GB, medians of {options.runs}, in turn")
    wanted = min(1.2, size / medians["sha256sum"])
    for side, seconds in medians.items():
        holds = side == "sha256sum" or size / seconds >= wanted
        say(side, f"{size / seconds:.2f} GB/s", f"{wanted:.2f} GB/s", holds)
    print(f"  cores that verify kept busy: {statistics.median(spent):.2f}")


def fill(where: Path, count: int) -> None:
    """A library of `count` small experts, all different, as `add` would keep them. Without waiting
    for the disk: what is measured is reading it."""
    from adaptlib.experts import Library
    from adaptlib.experts.codec import Module, Packed, encode_manifest
    from adaptlib.experts.names import expert_ref
    from adaptlib.experts.tensors import RawTensor

    rng = np.random.default_rng(0)
    library = Library.open(where, create=True)
    modules = {f"model.layers.{layer}.q_proj": Module((8, 8), 2, 1.0) for layer in range(6)}
    shapes = [
        (f"{module}.{part}", shape)
        for module in modules
        for part, shape in (("lora_a", (2, 8)), ("lora_b", (8, 2)))
    ]
    fsync, os.fsync = os.fsync, lambda fd: None
    try:
        for i in range(count):
            tensors = {
                name: RawTensor(
                    "F32", shape, memoryview(rng.normal(size=shape).astype("<f4")).cast("B")
                )
                for name, shape in shapes
            }
            card = {
                "task": f"task {i}",
                "base": {"id": "some/base", "revision": None, "digest": None},
            }
            packed = Packed("lora", "some/base", modules, tensors, card)
            manifest = packed.manifest(str(library.store.put(packed.blob())))
            digest = library.store.put(encode_manifest(f"e{i}", manifest))
            library.store.move(expert_ref(f"e{i}"), digest, expect=None, reason="add")
    finally:
        os.fsync = fsync


def list_(scratch: Path, options: argparse.Namespace) -> None:
    from adaptlib.experts import Library

    where = scratch / "library"
    fill(where, options.experts)
    time.sleep(3)  # what was written just now is not taken from the index
    print(f"list: {options.experts:,} experts, medians of {options.runs} processes")
    started = time.perf_counter()
    assert len(Library.open(where).summaries()) == options.experts
    elapsed = time.perf_counter() - started
    say("the index made anew", f"{elapsed:.2f} s", "10 s", elapsed <= 10)
    sides = {
        f"adaptlib list {options_}".rstrip(): options_
        for options_ in ("", "-q", "--json", "--filter 'rank>=2' --sort task")
    }
    medians = in_turn(
        {
            side: lambda more=more: shell(f"{ADAPTLIB} list {more} -L {where}")
            for side, more in sides.items()
        },
        options.runs,
    )
    for side, seconds in medians.items():
        say(side, f"{seconds:.3f} s", "0.3 s", seconds <= 0.3)


def start(scratch: Path, options: argparse.Namespace) -> None:
    medians = in_turn(
        {
            "adaptlib --version": lambda: shell(f"{ADAPTLIB} --version"),
            "adaptlib --help": lambda: shell(f"{ADAPTLIB} --help"),
            "python -c pass": lambda: shell(f"{sys.executable} -c pass"),
        },
        options.runs,
    )
    print(f"start: medians of {options.runs} processes")
    for side, seconds in medians.items():
        budget = {"adaptlib --version": 0.1, "adaptlib --help": 0.4}.get(side)
        say(
            side,
            f"{seconds:.3f} s",
            f"{budget} s" if budget else "",
            not budget or seconds <= budget,
        )


PARTS = {"start": start, "add": add, "memory": memory, "verify": verify, "list": list_}


def _chosen(text: str) -> Iterator[str]:
    for part in text.split(","):
        if part not in PARTS:
            raise SystemExit(f"no part {part!r}; there are: {', '.join(PARTS)}")
        yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, joined by commas")
    parser.add_argument("--megabytes", type=int, default=100, help="the adapter that is added")
    parser.add_argument("--experts", type=int, default=10_000, help="how many are listed")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for part in _chosen(options.only):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            PARTS[part](Path(scratch), options)


if __name__ == "__main__":
    main()
