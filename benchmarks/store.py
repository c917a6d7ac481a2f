"""Adding an adapter of 100 MB, beside `cp` and `sha256sum` of the same file.

    python benchmarks/store.py [--megabytes 100] [--runs 7]

The floor is what `cp` and `sha256sum` do: read each byte, write it, hash it. `add` also looks at
every value for NaN, and waits until the bytes are on the disk (fsync), which `cp` does not; `cp` with
`sync` is shown for that reason. Budget: at least half the speed of cp + sha256sum.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make_adapter(directory: Path, megabytes: int) -> None:
    """A PEFT adapter of a model of width 2048: rank 16, as many layers as it takes, float32."""
    import json

    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    from adaptlib.experts import Library

    adaptlib = str(Path(sys.executable).with_name("adaptlib"))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        source = Path(scratch) / "adapter"
        make_adapter(source, options.megabytes)
        weights = source / "adapter_model.safetensors"
        size = weights.stat().st_size / 1e6
        subprocess.run(["sha256sum", str(weights)], check=True, stdout=subprocess.DEVNULL)  # warm

        def shell(command: str) -> float:
            started = time.perf_counter()
            subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - started

        def in_process() -> float:
            where = Path(scratch) / "library"
            library = Library.open(where, create=True)
            started = time.perf_counter()
            library.add(source, "expert")
            elapsed = time.perf_counter() - started
            shutil.rmtree(where)
            return elapsed

        def command() -> float:
            where = Path(scratch) / "library"
            Library.open(where, create=True)
            elapsed = shell(f"{adaptlib} add {source} --name expert -L {where} 2>&1")
            shutil.rmtree(where)
            return elapsed

        copy = Path(scratch) / "copy"
        sides = {
            "cp + sha256sum": lambda: shell(f"cp {weights} {copy} && sha256sum {copy}; rm {copy}"),
            "cp + sync + sha256sum": lambda: shell(
                f"cp {weights} {copy} && sync {copy} && sha256sum {copy}; rm {copy}"
            ),
            "library.add": in_process,
            "adaptlib add": command,
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.runs):
            for side, run in sides.items():
                times[side].append(run())
        floor = statistics.median(times["cp + sha256sum"])
        print(f"{size:.0f} MB, medians of {options.runs}, in turn")
        for side, values in times.items():
            median = statistics.median(values)
            print(
                f"{side:22} {median:6.3f} s  {size / median:6.0f} MB/s  "
                f"{floor / median:5.2f} x the speed of cp + sha256sum"
            )


if __name__ == "__main__":
    main()
