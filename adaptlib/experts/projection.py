"""Sketches: a few numbers for an update, whose inner products are those of the updates, about.

The sketch of ΔW (d_out, d_in) has `size` numbers. Entry (i, j) is added to number
(h_out(i) + h_in(j)) modulo size with the sign s_out(i) s_in(j): TensorSketch (Pham and Pagh 2013,
section 4), which for ΔW = B A is a sum of circular convolutions of sketches of B's columns with
those of A's rows, so no ΔW is made. The inner product of two sketches has the mean <ΔW, ΔW'>, and
an error of about |ΔW| |ΔW'| √(2 / size), whatever the ranks. (A projection from both sides,
Ω_out ΔW Ω_in, errs by √(4 / √size) at rank 1: on the bundle's LoRA experts with 256 numbers the
error of a cosine is .022, of these .013.)

The places h are fixed for each side and width: a permutation, modulo size. The signs depend on the
seed. Both come from the bits of Philox, a counter-based generator, so they are the same on every
machine. numpy only: `add` makes sketches, and must not wait for torch, nor for jaxtyping, so that
shapes are in the docstrings.
"""

import hashlib
from functools import lru_cache

import numpy as np

SIDES = {"out": 0, "in": 1}
CHUNK = 1 << 18  # entries of a sparse update handled at once


@lru_cache(maxsize=64)
def order(side: str, width: int) -> np.ndarray:
    """A fixed permutation, (width,): index `order[p]` has the place p modulo size."""
    bits = np.random.Philox(key=width * 2 + SIDES[side]).random_raw(width)
    return np.argsort(bits, kind="stable")


def signs(seed: int, side: str, width: int) -> np.ndarray:
    """(width,), 1 or -1 for each p: the sign of the index `order[p]`."""
    bits = np.random.Philox(key=[seed, 2 + SIDES[side]]).random_raw(-(-width // 64))
    return np.unpackbits(bits.astype("<u8").view(np.uint8), count=width) * np.float32(2) - 1


def module_seed(seed: int, module: str) -> int:
    """Each module has its own, so that the errors of modules are independent and average out."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{module}".encode()).digest()[:4], "big")


def sketch_lora(
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    *,
    seed: int,
    size: int,
) -> np.ndarray:
    """The sketch (size,) of scale · B A, for `a` (rank, d_in) and `b` (d_out, rank), float32."""
    rank, widths = len(a), (("out", len(b)), ("in", a.shape[1]))
    b = _padded(np.take(b, order("out", len(b)), axis=0, mode="clip"), 0, size)
    a = _padded(np.take(a, order("in", a.shape[1]), axis=1, mode="clip"), 1, size)
    left, right = (_padded(signs(seed, side, width), 0, size) for side, width in widths)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever compares sketches looks for NaN
        b = np.einsum("cmr,cm->mr", b.reshape(-1, size, rank), left.reshape(-1, size))
        a = np.einsum("rcm,cm->rm", a.reshape(rank, -1, size), right.reshape(-1, size))
        products = np.einsum("fr,rf->f", np.fft.rfft(b, axis=0), np.fft.rfft(a, axis=1))
        return np.fft.irfft(products, size).astype(np.float32) * np.float32(scale)


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """With zeros at the end of an axis, up to a whole number of times `size`."""
    lack = -array.shape[axis] % size
    if not lack:
        return array
    ends = [(0, lack if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, ends)


def sketch_sparse(
    index: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    *,
    seed: int,
    size: int,
) -> np.ndarray:
    """The sketch (size,) of the matrix of this shape with `values` (n,) at the flat positions
    `index` (n,), or (n, block, block) at those of blocks; float32."""
    total = np.zeros(size)
    block = 1 if values.ndim == 1 else values.shape[1]
    places, marks = [], []
    for side, width in zip(SIDES, shape, strict=True):
        place, mark = np.empty(width, np.int32), np.empty(width, np.float32)
        place[order(side, width)] = np.arange(width, dtype=np.int32) % size
        mark[order(side, width)] = signs(seed, side, width)
        places.append(place.reshape(-1, block))
        marks.append(mark.reshape(-1, block))
    across = shape[1] // block
    step = max(1, CHUNK // block**2)
    for i in range(0, len(index), step):
        row, column = np.divmod(index[i : i + step], across)
        place = places[0][row][:, :, None] + places[1][column][:, None, :]
        sign = marks[0][row][:, :, None] * marks[1][column][:, None, :]
        entries = values[i : i + step].reshape(sign.shape) * sign
        with np.errstate(over="ignore", invalid="ignore"):
            total += np.bincount(place.reshape(-1) % size, entries.reshape(-1), size)
    with np.errstate(over="ignore"):
        return total.astype(np.float32)
