"""Merging 20 LoRA experts of a 1B-shaped model, beside PEFT's `add_weighted_adapter` and mergekit.

    python benchmarks/merging.py [--layers 1] [--runs 3] [--mergekit PYTHON]

The shapes are those of Llama 3.2 1B (width 2048, MLP 8192, keys and values 512, all seven
projections), of which `--layers` of the 16 layers are made, with a vocabulary of 1,000; nothing is
scaled up to 16. Weights and experts are random, float32, rank 16. Each side is a process of its
own with one thread (as a recipe's merge has in adaptlib, for its digest), sides take turns within a
round, and all read the same adapters. Seconds are of CPU, which other work on the machine changes
little; how many times faster is said in wall time too.

- adaptlib: `{name: library.stream(name)}` into the merge, result in memory as LoRA.
- PEFT: the adapters are loaded onto the base first (timed apart); only `add_weighted_adapter` is
  timed. Its `*_svd` and ours keep rank 16, and are of the attention's four projections alone, as
  its dense SVD of 8192 x 2048 takes minutes (svd_full_matrices=False, which is faster); its `linear`, `ties`, ... are of the factors, for which
  ours is `on="factors"`.
- mergekit: merges full models, which are made of the adapters beforehand, at no cost to it, and
  writes one, again of the attention's projections (20 models are 20 files; the MLP is narrow); ours is the merge of the same experts with every entry kept, baked into the base and
  written (`write_model`, what `export --merged-base` does). `--mergekit` is the Python of an
  environment that has it (0.1.5); only what it offers is called.

Peak memory is that of the whole process, imports and all: VmHWM, resident memory with mapped files,
and the most anonymous memory (RssAnon, read every 2 ms).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RANK = 16
WIDTH, MLP, KV = 2048, 8192, 512
SHAPES = {  # (d_out, d_in)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.up_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
}
DENSITY = 0.2
# PEFT's name: (ours, our arguments).
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "cat": ("cat", {}),
    "linear": ("linear", {"on": "factors"}),
    "ties": ("ties", {"on": "factors", "density": DENSITY}),
    "magnitude_prune": ("magnitude_prune", {"on": "factors", "density": DENSITY}),
    "svd": ("svd", {"rank": RANK}),
    "ties_svd": ("ties", {"rank": RANK, "density": DENSITY}),
    "dare_linear_svd": ("dare_linear", {"rank": RANK, "density": DENSITY}),
    "dare_ties_svd": ("dare_ties", {"rank": RANK, "density": DENSITY}),
    "magnitude_prune_svd": ("magnitude_prune", {"rank": RANK, "density": DENSITY}),
}
ALL = {"kind": "sparse", "keep_ratio": 1.0}  # every entry: as exact as a full model
# mergekit's name: (its parameters, our arguments).
MERGEKIT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "task_arithmetic": ({}, {}),
    "slerp": ({"t": 0.5}, {"t": 0.5}),
    "ties": ({"density": DENSITY}, {"density": DENSITY} | ALL),
    "dare_linear": ({"density": DENSITY}, {"density": DENSITY} | ALL),
    "dare_ties": ({"density": DENSITY}, {"density": DENSITY} | ALL),
    "breadcrumbs": ({"density": 0.09, "gamma": 0.01}, {"beta": 0.9, "gamma": 0.99} | ALL),
    "della": (
        {"density": DENSITY, "epsilon": 0.1},
        {"density": DENSITY, "epsilon": 0.1} | ALL,
    ),
}


# -- what they read --------------------------------------------------------------------------------


def make(folder: Path, experts: int, layers: int, *, full: bool = False, only: str = "") -> None:
    """The base, the adapters as PEFT writes them, a library of them; for mergekit full models.
    `only` is what the names of the adapted modules begin with."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from adaptlib.experts import Library

    torch.manual_seed(0)
    base = folder / "base"
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=KV if only else MLP,  # what is not adapted need not be large
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    shapes = {name: shape for name, shape in SHAPES.items() if name.startswith(only)}
    library = Library.open(folder / "library", create=True)
    weights = load_file(base / "model.safetensors") if full else {}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name.rpartition(".")[2] for name in shapes],
    }
    for k in range(experts):
        where = folder / "adapters" / f"e{k}"
        where.mkdir(parents=True)
        tensors, summed = {}, dict(weights)
        for layer in range(layers):
            for name, (d_out, d_in) in shapes.items():
                module = f"model.layers.{layer}.{name}"
                a, b = 0.02 * torch.randn(RANK, d_in), 0.02 * torch.randn(d_out, RANK)
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
                if full:
                    summed[f"{module}.weight"] = weights[f"{module}.weight"] + b @ a
        save_file(tensors, where / "adapter_model.safetensors")
        (where / "adapter_config.json").write_text(json.dumps(about))
        library.add(where, f"e{k}")
        if full:
            into = folder / "full" / f"e{k}"
            into.mkdir(parents=True)
            save_file(summed, into / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(base / "config.json", into)


# -- the sides, each in a process of its own -------------------------------------------------------


def status(field: str) -> float:
    """MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) / 1024


@contextmanager
def measured(found: dict[str, float], loaded: float = 0.0) -> Iterator[None]:
    """Seconds and peak memory of what is done inside; the peaks are of the process so far."""
    highest, over = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            highest.append(max(highest.pop(), status("RssAnon")))

    thread = threading.Thread(target=watch, daemon=True)
    found |= {"before_mb": status("VmRSS"), "load_s": loaded}
    thread.start()
    began, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    over.set()
    thread.join()
    found |= {"peak_mb": status("VmHWM"), "anon_mb": highest[0]}


def adaptlib_side(folder: Path, method: str, few: int, options: dict[str, Any]) -> dict[str, Any]:
    from adaptlib.experts import Library
    from adaptlib.merging import MERGES

    out = options.pop("out", None)
    if out is not None:  # imports are in nobody's time
        import transformers.models.llama.modeling_llama  # noqa: F401

        import adaptlib.merging.bake  # noqa: F401
    began = time.perf_counter()
    library = Library.open(folder / "library")
    experts = {f"e{k}": library.stream(f"e{k}") for k in range(few)}
    found: dict[str, Any] = {}
    with measured(found, time.perf_counter() - began):
        merged = MERGES[method](experts, **options)
        if out is not None:
            write_into_base(folder / "base", merged, Path(out))
    return found | {"error": merged.card["merge"]["error"]}


def write_into_base(base: Path, merged: Any, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    from adaptlib.merging.bake import write_model

    class NoTokenizer:  # mergekit is told to copy none
        def save_pretrained(self, directory: Path) -> None:
            pass

    write_model(AutoModelForCausalLM.from_pretrained(base), NoTokenizer(), merged, out)


def peft_side(folder: Path, method: str, few: int, options: dict[str, Any]) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapters" / "e0", adapter_name="e0")
    for k in range(1, few):
        model.load_adapter(folder / "adapters" / f"e{k}", f"e{k}")
    names, weight = [f"e{k}" for k in range(few)], options.pop("weight", 1.0)
    found: dict[str, Any] = {}
    with measured(found, time.perf_counter() - began):
        model.add_weighted_adapter(
            names, [weight] * few, "merged", combination_type=method, **options
        )
    return found


def mergekit_side(folder: Path, method: str, few: int, options: dict[str, Any]) -> dict[str, Any]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(folder / "full" / f"e{k}")} for k in range(few)]
    weight = 1 / few if method in ("linear", "dare_linear") else 1.0
    out = options.pop("out")
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": options}
    if method == "slerp":
        config |= {"models": models, "base_model": models[0]["model"]}
    else:
        config["models"] = [one | {"parameters": {"weight": weight}} for one in models]
        config |= {} if method == "linear" else {"base_model": str(folder / "base")}
    said = MergeOptions(
        lazy_unpickle=True, low_cpu_memory=True, copy_tokenizer=False, quiet=True,
        write_model_card=False,
    )  # fmt: skip
    found: dict[str, Any] = {}
    with measured(found):
        run_merge(MergeConfiguration.model_validate(config), out, said)
    return found


SIDES = {"adaptlib": adaptlib_side, "peft": peft_side, "mergekit": mergekit_side}


def run(python: str, side: str, folder: Path, method: str, few: int, **options: Any) -> Any:
    """One side in a fresh process; it says what it found as its last line."""
    written = folder / "written" if side == "mergekit" or options.get("out") else None
    if written is not None:
        options["out"] = str(written)
    said = json.dumps([side, str(folder), method, few, options])
    done = subprocess.run(
        [python, __file__, "--side", said],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if written is not None:
        shutil.rmtree(written, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{side} {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the tables ------------------------------------------------------------------------------------


def in_turn(
    rounds: int, sides: Mapping[str, tuple[str, str, Path, str, int, dict[str, Any]]]
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (python, side, folder, method, few, options) in sides.items():
            found[name].append(run(python, side, folder, method, few, **options))
    return found


def median(rows: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


HEAD = (
    f"{'':20}{'adaptlib s':>11}{'theirs s':>10}{'faster':>8}{'wall':>7}{'adaptlib MB':>13}"
    f"{'theirs MB':>11}{'of it':>7}{'anonymous':>16}{'of it':>7}{'error':>8}"
)


def line(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """Medians; ratios are medians of each round's."""

    def ratio(key: str) -> float:
        return statistics.median(b[key] / a[key] for a, b in zip(ours, theirs, strict=True))

    mine, other = median(ours, "peak_mb"), median(theirs, "peak_mb")
    own, others = median(ours, "anon_mb"), median(theirs, "anon_mb")
    wanted = {"time": ratio("cpu_s") > 1, "memory": mine <= other / 2}
    missed = [what for what, met in wanted.items() if not met]
    return (
        f"{name:20}{median(ours, 'cpu_s'):11.2f}{median(theirs, 'cpu_s'):10.2f}"
        f"{ratio('cpu_s'):8.1f}{ratio('s'):7.1f}{mine:13,.0f}{other:11,.0f}{mine / other:7.2f}"
        f"{f'{own:,.0f} / {others:,.0f}':>16}{own / others:7.2f}{median(ours, 'error'):8.3f}"
        + (f"  {' and '.join(missed)} NOT met" if missed else "")
    )


def against_peft(options: argparse.Namespace, folder: Path) -> None:
    print(f"\n## beside PEFT's add_weighted_adapter, {options.experts} experts", flush=True)
    print(HEAD, flush=True)
    loads: list[Any] = []
    for name, (ours, arguments) in PEFT.items():
        if options.only and name not in options.only:
            continue
        theirs = {} if name in ("cat", "linear", "svd") else {"density": DENSITY}
        theirs |= {"svd_rank": RANK, "svd_full_matrices": False} if name.endswith("svd") else {}
        mine = arguments | {"weights": [1.0] * options.experts}
        rounds = 1 if name.endswith("svd") and not options.every else options.runs
        where = folder / "attention" if name.endswith("svd") else folder
        if not where.exists():
            make(where, options.experts, options.layers, only="self_attn")
        here = (sys.executable, "adaptlib", where, ours, options.experts, mine)
        other = (sys.executable, "peft", where, name, options.experts, theirs)
        found = in_turn(rounds, {"ours": here, "theirs": other})
        loads += found["theirs"]
        print(line(name, found["ours"], found["theirs"]), flush=True)
    if loads:
        print(
            f"loading base and adapters in PEFT, not in its time: {median(loads, 'load_s'):.1f} s"
        )


def against_mergekit(options: argparse.Namespace, folder: Path) -> None:
    if options.mergekit is None:
        print("\nmergekit: not run; give --mergekit PYTHON, an environment that has it", flush=True)
        return
    print(f"\n## beside mergekit, {options.experts} experts (slerp: 2), a full model written")
    print(HEAD, flush=True)
    folder = folder / "full"
    make(folder, options.experts, options.layers, full=True, only="self_attn")
    for name, (theirs, mine) in MERGEKIT.items():
        if options.only and name not in options.only:
            continue
        few = 2 if name == "slerp" else options.experts
        here = (sys.executable, "adaptlib", folder, name, few, mine | {"out": True})
        other = (options.mergekit, "mergekit", folder, name, few, dict(theirs))
        found = in_turn(options.runs, {"ours": here, "theirs": other})
        print(line(name, found["ours"], found["theirs"]), flush=True)


def streamed(options: argparse.Namespace, folder: Path) -> None:
    found = run(
        sys.executable, "adaptlib", folder, "ties", options.many, rank=RANK, density=DENSITY
    )
    met = "met" if found["peak_mb"] < 2000 else "NOT met"
    print(
        f"\n## TIES of {options.many} experts, kept at rank {RANK}\n"
        f"{found['s']:.0f} s ({found['cpu_s']:.0f} s of CPU), peak memory {found['peak_mb']:,.0f} MB "
        f"({found['before_mb']:,.0f} MB before it), wanted below 2,000: {met}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=1, help="of 16")
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--every", action="store_true", help="repeat PEFT's slow SVDs too")
    parser.add_argument("--many", type=int, default=100, help="of TIES alone; 0: not run")
    parser.add_argument("--mergekit", metavar="PYTHON", help="of an environment with mergekit")
    parser.add_argument("--only", nargs="*", help="these methods")
    parser.add_argument("--parts", nargs="*", default=["peft", "mergekit", "many"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, folder, method, few, more = json.loads(options.side)
        print(json.dumps(SIDES[side](Path(folder), method, few, more)))
        return
    params = sum(d_out * d_in for d_out, d_in in SHAPES.values()) * options.layers
    print(
        f"{options.layers} of 16 layers of the 1B shape, {params / 1e6:.1f} M adapted weights, float32; "
        f"rank {RANK}; medians of {options.runs} in turn"
        + ("" if options.every else " (beside PEFT's SVDs: once)"),
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="adaptlib-merging-") as scratch:
        folder = Path(scratch)
        make(folder, options.experts, options.layers)
        for part, measure in (("peft", against_peft), ("mergekit", against_mergekit)):
            if part in options.parts:
                measure(options, folder)
    if options.many and "many" in options.parts:
        with tempfile.TemporaryDirectory(prefix="adaptlib-merging-") as scratch:
            make(Path(scratch), options.many, options.layers)
            streamed(options, Path(scratch))


if __name__ == "__main__":
    main()
