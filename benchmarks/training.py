"""What a training step costs: LoRA and sparse next to PEFT's, in time and memory.

    python benchmarks/training.py [--threads 2] [--rounds 30]

Contenders take turns, one step each a round, so that a busy moment hits all of them; the ratio is the
median over rounds of this round's times. Peak memory is measured in a fresh process each: the
highest resident size in three steps, less the resident size with the model loaded. All contenders
have the same model, batch, loss, optimizer (AdamW) and clipping.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adaptlib.training import TrainOptions
from adaptlib.training.encode import IGNORED, Batch
from adaptlib.training.full import FullTrainee
from adaptlib.training.lora import LoRATrainee
from adaptlib.training.modules import shape_of, target_modules
from adaptlib.training.run import answer_loss
from adaptlib.training.sparse import SparseTrainee
from adaptlib.training.trainee import Trainee

RANK = 8
SIZES = {
    "3.9 M (the bundled base)": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
                                 "num_attention_heads": 6, "num_key_value_heads": 2},
    "52 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
             "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip
ROWS, LENGTH, ANSWER = 16, 48, 4
INSTALLED = ExitStack()  # what holds the trainees in their models, until the process ends


@dataclass
class Contender:
    """`step` is one training step; `parameters` what it moves."""

    name: str
    step: Callable[[Batch], None]
    parameters: int


def make_model(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=True, **SIZES[size]))
    return model.requires_grad_(False).train()


def make_batch(seed: int) -> Batch:
    ids = torch.randint(8192, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -ANSWER:] = ids[:, -ANSWER:].roll(-1, 1)
    return Batch(ids, torch.ones_like(ids), labels, tuple(range(ROWS)))


def stepper(
    model: Any,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    after: Callable[[], None],
) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        answer_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after()

    return step


def ours(name: str, trainee: Trainee, model: Any) -> Contender:
    INSTALLED.enter_context(trainee.installed())
    batch = make_batch(0)
    trainee.begin([lambda: answer_loss(model, batch)])
    parameters = trainee.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    step = stepper(
        model,
        optimizer,
        parameters,
        lambda: trainee.stepped(1, 1, lambda: answer_loss(model, batch)),
    )
    return Contender(name, step, sum(p.numel() for p in parameters))


def peft_model(name: str, model: Any, config: Any) -> Contender:
    from peft import get_peft_model

    # answer_loss passes arguments that PEFT hands on, and asks for `device`, which it has
    adapted = get_peft_model(model, config).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    step = stepper(adapted, optimizer, parameters, lambda: None)
    return Contender(name, step, sum(p.numel() for p in parameters))


def masked(name: str, model: Any, ratio: float) -> Contender:
    """A dense Ŵ, its mask, dense gradients and moments to the end: as the authors' code does."""
    options = TrainOptions(keep_ratio=ratio, selection="magnitude", reselect_every=10**9)
    trainee = SparseTrainee(target_modules(model, "all-linear"), options)
    contender = ours(name, trainee, model)
    trainee.select(lambda: torch.zeros(()))
    return contender


def contend(name: str, size: str) -> Contender:
    model: Any = make_model(size)
    modules = target_modules(model, "all-linear")
    shapes = [shape_of(module) for module in modules.values()]
    ratio = RANK * sum(o + i for o, i in shapes) / sum(o * i for o, i in shapes)
    ends = sorted({module.rpartition(".")[2] for module in modules})
    if name == "LoRA":
        return ours(name, LoRATrainee(modules, TrainOptions(rank=RANK)), model)
    if name == "PEFT LoRA":
        from peft import LoraConfig

        return peft_model(name, model, LoraConfig(r=RANK, lora_alpha=16, target_modules=ends))
    if name == "PEFT SHiRA":
        from peft import ShiraConfig

        return peft_model(name, model, ShiraConfig(r=RANK, target_modules=ends))
    if name == "sparse, dense-masked":
        return masked(name, model, ratio)
    if name == "full":
        return ours(name, FullTrainee(modules, TrainOptions()), model)
    block = 16 if "block" in name else 1
    options = TrainOptions(keep_ratio=ratio, block=block, selection="random")
    return ours(name, SparseTrainee(modules, options), model)


NAMES = (
    "LoRA",
    "PEFT LoRA",
    "sparse, entries",
    "sparse, blocks",
    "sparse, dense-masked",
    "PEFT SHiRA",
    "full",
)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Of this process alone; getrusage's figure begins with that of the parent."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


def memory(name: str, size: str, threads: int) -> float:
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import warnings; warnings.simplefilter('ignore')\n"
        f"import torch; torch.set_num_threads({threads})\n"
        "import training as t\n"
        "from peft import LoraConfig\n"
        f"m = t.make_model({size!r}); before = t.resident()\n"
        f"del m; c = t.contend({name!r}, {size!r}); b = t.make_batch(0)\n"
        "[c.step(b) for _ in range(3)]\n"
        "print(t.highest() - before)\n"
        "t.INSTALLED.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    for size in SIZES:
        contenders = [contend(name, size) for name in NAMES]
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for turn in range(args.rounds + 3):
            batch = make_batch(turn)
            for contender in contenders:
                start = time.perf_counter()
                contender.step(batch)
                if turn >= 3:
                    times[contender.name].append(time.perf_counter() - start)
        print(
            f"\n{size} parameters, batch {ROWS} x {LENGTH}, {args.threads} threads, torch {torch.__version__}"
        )
        print(
            f"{'':22} {'parameters':>10} {'ms a step':>10} {'x LoRA':>7} {'x PEFT LoRA':>11} {'peak MB':>8}"
        )
        peaks = {name: memory(name, size, args.threads) for name in NAMES}
        for contender in contenders:
            here = times[contender.name]
            ratios = [
                statistics.median(a / b for a, b in zip(here, times[other], strict=True))
                for other in ("LoRA", "PEFT LoRA")
            ]
            print(
                f"{contender.name:22} {contender.parameters:10,} {1e3 * statistics.median(here):10.1f} "
                f"{ratios[0]:7.2f} {ratios[1]:11.2f} {peaks[contender.name]:8.0f}"
            )


if __name__ == "__main__":
    with INSTALLED:
        main()
