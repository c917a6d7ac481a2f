"""The least that a routed forward must do, in multiply-adds and in bytes, and how long that takes at
the speed of a plain matrix product and of memory on this machine.

Counted: the products with W and with the vocabulary, attention's two products, the logits of the
experts, the chosen experts' factors. Bytes: the weights, the KV cache, the prototypes, and the
factors of the experts that some token chose, each read once. Not counted: norms, activations,
softmax, writing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from routing_sides import Setting


@dataclass(frozen=True)
class Speed:
    """Multiply-adds and bytes a second."""

    product: float
    memory: float


@dataclass(frozen=True)
class Floor:
    """Multiply-adds a token and bytes a pass, by what needs them; `tok` tokens in the pass."""

    tok: int
    base: float
    logits: float
    chosen: float
    base_bytes: float
    routed_bytes: float

    @property
    def adds(self) -> float:
        return self.base + self.logits + self.chosen

    @property
    def bytes(self) -> float:
        return self.base_bytes + self.routed_bytes

    def seconds(self, speed: Speed) -> float:
        return max(self.tok * self.adds / speed.product, self.bytes / speed.memory)


def floor(setting: Setting, experts: int, tok: int, *, context: int = 0, rank: int = 0) -> Floor:
    """Of a pass over `tok` tokens after `context` in a cache. With no experts, of the base."""
    shapes = setting.modules.values()
    weights = sum(o * i for o, i in shapes) + setting.vocab * setting.width
    before = context + (tok + 1) / 2  # tokens that one attends to, on average
    attention = 2 * setting.layers * setting.width * before
    size = setting.dtype.itemsize
    cache = 2 * setting.layers * setting.width * context
    k, rank = min(setting.top_k, experts), rank or setting.rank
    inputs, sides = sum(i for _, i in shapes), sum(o + i for o, i in shapes)
    # of experts that are chosen alike, how many some token chose
    touched = experts * (1 - (1 - k / experts) ** tok) if experts else 0.0
    return Floor(
        tok,
        base=weights + attention,
        logits=experts * inputs if experts > 1 else 0,
        chosen=k * rank * sides,
        base_bytes=size * (weights + cache),
        routed_bytes=(4 * experts * inputs if experts > 1 else 0) + size * touched * rank * sides,
    )


def speed(setting: Setting, runs: int = 15) -> Speed:
    """The best of what this machine does: a floor is not made of a busy moment."""
    big = setting.device != "cpu"
    side, length = (8192, 1 << 28) if big else (1024, 1 << 25)
    options = {"dtype": setting.dtype, "device": setting.device}
    a, b = torch.randn(side, side, **options), torch.randn(side, side, **options)
    source, target = torch.ones(length, **options), torch.empty(length, **options)
    rows, x = source.view(-1, 2048), torch.ones(2048, **options)
    size = length * setting.dtype.itemsize
    reading = size / _best(lambda: rows @ x, runs)
    copying = 2 * size / _best(lambda: target.copy_(source), runs)
    return Speed(side**3 / _best(lambda: a @ b, runs), max(reading, copying))


def _best(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
