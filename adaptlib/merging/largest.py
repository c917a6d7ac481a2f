"""The largest entries of a matrix by |.|: exactly so many, of equal ones those that come first."""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor


def index_of_largest(values: Float[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Where the `count` entries of largest size are, rising; of equal ones the first."""
    count = min(count, len(values))
    if count <= 0:
        return torch.zeros(0, dtype=torch.long, device=values.device)
    sizes = values.abs().cpu().numpy()
    least = kth_largest(sizes, count)
    kept = sizes > least
    equal = np.flatnonzero(sizes == least)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    return torch.from_numpy(np.flatnonzero(kept)).to(values.device)


def kth_largest(sizes: NDArray[np.float32], count: int) -> float:
    """The `count`th largest. By numpy: torch's kthvalue and topk take six to sixteen times as
    long for the 16 million entries of a large module."""
    place = len(sizes) - count
    return float(np.partition(sizes, place)[place])
