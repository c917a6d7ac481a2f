"""Merges by entries the slow way: numpy, float64, one entry after another."""

import numpy as np

from adaptlib.experts import Delta, LoRADelta, SparseDelta
from adaptlib.merging.draws import draws, survivors


def matrix(delta: Delta) -> np.ndarray:
    """ΔW, float64, from its parts."""
    if isinstance(delta, LoRADelta):
        return delta.scale * delta.b.double().numpy() @ delta.a.double().numpy()
    assert isinstance(delta, SparseDelta)
    found = np.zeros(delta.shape)
    across = delta.shape[1] // delta.block
    for place, value in zip(delta.index.tolist(), delta.values.double().numpy(), strict=True):
        row, column = place // across * delta.block, place % across * delta.block
        found[row : row + delta.block, column : column + delta.block] = value
    return found


def held(delta: Delta) -> np.ndarray:
    """Whether the expert holds the entry."""
    if isinstance(delta, LoRADelta):
        return matrix(delta) != 0
    ones = SparseDelta(delta.index, 0 * delta.values + 1, delta.shape, delta.block)
    return matrix(ones) == 1


def largest(w: np.ndarray, count: int) -> np.ndarray:
    """Whether the entry is among the `count` largest by size; of equal ones the first."""
    flat = [(-abs(value), place) for place, value in enumerate(w.reshape(-1))]
    found = np.zeros(w.size, dtype=bool)
    for _, place in sorted(flat)[:count]:
        found[place] = True
    return found.reshape(w.shape)


def fused(taus, weights, scale, elect):
    """Elect and merge, entry by entry."""
    found = np.zeros_like(taus[0])
    for place in np.ndindex(found.shape):
        values = [tau[place] for tau in taus]
        votes = np.sign(values) if elect == "frequency" else values
        sign = 1 if sum(votes) >= 0 else -1
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if np.sign(v) == sign]
        if elect == "none":
            found[place] = sum(w * v for w, v in zip(weights, values, strict=True))
        elif agree:
            found[place] = sum(w * v for w, v in agree) / len(agree)
    return scale * found


def kept_count(w, density):
    return max(1, int(density * w.size))


def ties(part, *, density=0.2, scale=1.0, elect="total"):
    ws = [matrix(delta) for delta in part.deltas]
    taus = [w * largest(w, kept_count(w, density)) for w in ws]
    return fused(taus, part.weights, scale, elect)


def magnitude_prune(part, *, density=0.2):
    return ties(part, density=density, elect="none")


def breadcrumbs(part, *, beta=0.9, gamma=0.99, scale=0.4):
    taus = []
    for w in map(matrix, part.deltas):
        small = ~largest(w, w.size - int(beta * w.size))
        outliers = largest(w, w.size - int(gamma * w.size))
        taus.append(np.where(small | outliers, 0, w))
    return fused(taus, part.weights, scale, "none")


def _dropped(part, density, seed):
    for i, delta in enumerate(part.deltas):
        w = matrix(delta)
        number = part.generator(seed, i).initial_seed()
        mask = survivors(number, density, range(w.size)).reshape(w.shape)
        yield w * mask / density


def dare_linear(part, *, density=0.2, seed=0):
    return fused(list(_dropped(part, density, seed)), part.weights, 1.0, "none")


def dare_ties(part, *, density=0.2, scale=1.0, elect="total", seed=0):
    return fused(list(_dropped(part, density, seed)), part.weights, scale, elect)


def della(part, *, density=0.2, epsilon=0.1, scale=1.0, elect="total", seed=0):
    taus = []
    for i, delta in enumerate(part.deltas):
        w = matrix(delta)
        d_out, d_in = w.shape
        drawn = draws(part.generator(seed, i).initial_seed(), range(w.size), np.uint16)
        tau = np.zeros_like(w)
        for row in range(d_out):
            rising = sorted(range(d_in), key=lambda column: (abs(w[row, column]), column))
            for rank, column in enumerate(rising):
                chance = (density - epsilon) + 2 * epsilon * rank / max(1, d_in - 1)
                chance = max(1, round(chance * 65536)) / 65536
                if drawn[row * d_in + rank] < chance * 65536:
                    tau[row, column] = w[row, column] / chance
        taus.append(tau)
    return fused(taus, part.weights, scale, elect)


def slerp(part, *, t=0.5):
    ws = {place: w * matrix(d) for place, w, d in zip(part.places, part.weights, part.deltas)}  # noqa: B905
    zero = np.zeros(part.shape)
    found = ws.get(0, zero)
    for place in range(1, part.count):
        other = ws.get(place, zero)
        sizes = np.linalg.norm(found) * np.linalg.norm(other)
        cosine = (found * other).sum() / sizes if sizes else 1.0
        if abs(cosine) > 0.9995:
            found = (1 - t) * found + t * other
        else:
            angle = np.arccos(cosine)
            found = np.sin((1 - t) * angle) * found + np.sin(t * angle) * other
            found = found / np.sin(angle)
    return found


def uniform_sparse(part, *, scale=1.0):
    total = fused(list(map(matrix, part.deltas)), part.weights, scale, "none")
    count = sum(held(delta).astype(int) for delta in part.deltas)
    return total / np.maximum(count, 1)


SLOW = {
    function.__name__: function
    for function in (
        breadcrumbs,
        dare_linear,
        dare_ties,
        della,
        magnitude_prune,
        slerp,
        ties,
        uniform_sparse,
    )
}
