"""How far PEFT's Arrow prototypes are from the top right singular vectors that Arrow is defined by.

    python benchmarks/prototypes.py

PEFT takes 15 power iterations from a random start, adaptlib an eigenproblem of the size of the rank.
Reported as |cos| to a dense SVD in float64: random updates with a flat spectrum at a few ranks, and
every module of the bundled LoRA experts.
"""

import statistics
import time

import torch

from adaptlib import LoRADelta
from adaptlib.demo import experts


def dense(delta: LoRADelta) -> torch.Tensor:
    return torch.linalg.svd(delta.dense().double(), full_matrices=False).Vh[0]


def peft(delta: LoRADelta) -> torch.Tensor:
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    config = ArrowConfig()
    config.task_adapter_names = []
    layer = ArrowLoraLinearLayer(delta.shape[1], config)
    return layer.top_right_singular_vec_from_BA(delta.a.float(), delta.b.float())


def row(label: str, deltas: list[LoRADelta]) -> None:
    ours, theirs, times = [], [], {"adaptlib": 0.0, "peft": 0.0}
    for delta in deltas:
        exact = dense(delta).float()
        started = time.perf_counter()
        mine = delta.top_direction()
        middle = time.perf_counter()
        other = peft(delta)
        times["adaptlib"] += middle - started
        times["peft"] += time.perf_counter() - middle
        ours.append(abs(float(mine @ exact)))
        theirs.append(abs(float(other @ exact) / float(other.norm())))
    each = {side: 1000 * total / len(deltas) for side, total in times.items()}
    print(
        f"| {label} | {len(deltas)} | {statistics.median(ours):.6f} | {min(ours):.6f} | "
        f"{statistics.median(theirs):.3f} | {min(theirs):.3f} | {each['adaptlib']:.2f} | {each['peft']:.2f} |"
    )


def main() -> None:
    torch.manual_seed(0)
    print(
        "| updates | modules | adaptlib median | worst | PEFT median | worst | ms each | PEFT ms |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for rank in (4, 16, 64):
        deltas = [LoRADelta(torch.randn(rank, 512), torch.randn(512, rank)) for _ in range(20)]
        row(f"random, 512 x 512, rank {rank}", deltas)
    bundled = [d for e in experts().values() if e.kind == "lora" for d in e.deltas.values()]
    row("bundled LoRA experts", [d for d in bundled if isinstance(d, LoRADelta)])


if __name__ == "__main__":
    main()
