"""Tiny experts with planted families, and MBC written out slowly with numpy only."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta

MODULES = {f"layers.{i}.{side}": shape for i in range(6) for side, shape in
           (("q_proj", (24, 16)), ("down_proj", (16, 32)))}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays are tiny here; threads that wait for a busy core make the tests 5 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        yield
    torch.set_num_threads(before)


def lora_expert(generator, *, centre=None, noise=0.3, rank=4, scale=2.0, base="tiny") -> Expert:
    """Factors around those of `centre`, or around zero with noise 1."""

    def near(wanted, *shape):
        fresh = torch.randn(*shape, generator=generator)
        return fresh if wanted is None else wanted + noise * fresh

    return Expert(
        base,
        {
            name: LoRADelta(
                near(None if centre is None else centre.deltas[name].a, rank, d_in),
                near(None if centre is None else centre.deltas[name].b, d_out, rank),
                scale,
            )
            for name, (d_out, d_in) in MODULES.items()
        },
    )


def shuffled(generator, experts, family):
    """The experts under names that say nothing of their families; the families by those names."""
    order = torch.randperm(len(experts), generator=generator).tolist()
    names = [f"e{i:02}" for i in range(len(experts))]
    return (
        {name: experts[i] for name, i in zip(names, order, strict=True)},
        {name: family[i] for name, i in zip(names, order, strict=True)},
    )


@pytest.fixture
def make_expert() -> Callable:
    return lora_expert


@pytest.fixture
def lora_families() -> Callable:
    """(seed, sizes) -> LoRA experts of one rank, and the family of each."""

    def make(seed=0, sizes=(5, 4, 3), noise=0.3):
        generator = torch.Generator().manual_seed(seed)
        experts, family = [], []
        for i, size in enumerate(sizes):
            centre = lora_expert(generator)
            experts += [lora_expert(generator, centre=centre, noise=noise) for _ in range(size)]
            family += [i] * size
        return shuffled(generator, experts, family)

    return make


def sparse_of(dense: torch.Tensor, keep: int) -> SparseDelta:
    flat = dense.reshape(-1)
    index = flat.abs().topk(keep).indices.sort().values
    return SparseDelta(index, flat[index], tuple(dense.shape))


@pytest.fixture
def sparse_families() -> Callable:
    """Sparse experts: each family shares most of its positions and values."""

    def make(seed=0, sizes=(5, 4, 3), keep=60):
        generator = torch.Generator().manual_seed(seed)
        experts, family = [], []
        for i, size in enumerate(sizes):
            centre = {n: torch.randn(s, generator=generator) ** 3 for n, s in MODULES.items()}
            for _ in range(size):
                experts.append(
                    Expert(
                        "tiny",
                        {
                            name: sparse_of(
                                dense + 0.3 * torch.randn(dense.shape, generator=generator), keep
                            )
                            for name, dense in centre.items()
                        },
                    )
                )
            family += [i] * size
        return shuffled(generator, experts, family)

    return make


@pytest.fixture
def mixed_families() -> Callable:
    """Each family is one ΔW a module plus noise, kept as LoRA of rank 2, 4 or 8 or as sparse; some
    experts lack a module."""

    def make(seed=0, sizes=(6, 5, 4)):
        generator = torch.Generator().manual_seed(seed)
        experts, family = [], []
        for i, size in enumerate(sizes):
            centre = lora_expert(generator, rank=2)
            for j in range(size):
                deltas = {}
                for name, delta in centre.deltas.items():
                    dense = delta.dense()
                    dense = dense + 0.2 * dense.std() * torch.randn(
                        dense.shape, generator=generator
                    )
                    if j % 4 == 3:
                        deltas[name] = sparse_of(dense, dense.numel() // 2)
                    else:
                        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
                        rank = (2, 4, 8)[j % 4]
                        deltas[name] = LoRADelta(s[:rank, None] * vh[:rank], u[:, :rank])
                if j == 1:
                    del deltas[next(iter(deltas))]
                experts.append(Expert("tiny", deltas))
            family += [i] * size
        return shuffled(generator, experts, family)

    return make


def quantile_by_sorting(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    if below + 1 == len(ordered):
        return ordered[below]
    return ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])


def slow_cosines(rows: np.ndarray, sparsity: float | None) -> np.ndarray:
    """Steps 2 to 4 of MBC: zero, full SVD, cosine, each written out."""
    rows = rows.astype(np.float64).copy()
    if sparsity is not None:
        for row in rows:
            cut = quantile_by_sorting([abs(x) for x in row.tolist()], sparsity)
            row[np.abs(row) <= cut] = 0.0
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    kept = min(64, *rows.shape)
    embedding = u[:, :kept] * s[:kept]
    n = len(rows)
    cosines = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            norms = np.linalg.norm(embedding[i]) * np.linalg.norm(embedding[j])
            cosines[i, j] = embedding[i] @ embedding[j] / norms
    return cosines


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    """What K-means minimises: the squared distances to the mean of the own group."""
    total = 0.0
    for label in set(labels.tolist()):
        group = points[labels == label]
        total += ((group - group.mean(axis=0)) ** 2).sum()
    return total


def slow_starts(points: np.ndarray, k: int, count: int) -> Iterator[list[int]]:
    """k-means++: each next centre is a point, likelier the further it is from those before."""
    random = np.random.default_rng(1234)
    for _ in range(count):
        chosen = [int(random.integers(len(points)))]
        while len(chosen) < k:
            gaps = np.array([min(((p - points[c]) ** 2).sum() for c in chosen) for p in points])
            chosen.append(int(random.choice(len(points), p=gaps / gaps.sum())))
        yield chosen


def slow_kmeans(
    points: np.ndarray, k: int, starts: Iterable[list[int]]
) -> tuple[np.ndarray, float]:
    """Lloyd's iterations from each start (the points that are centres at first); the labels of
    least inertia, and that inertia."""
    best, best_labels = np.inf, np.zeros(len(points), dtype=int)
    for start in starts:
        centres = [points[i] for i in start]
        labels = np.full(len(points), -1)
        while True:
            new = np.array(
                [np.argmin([((p - c) ** 2).sum() for c in centres]) for p in points], dtype=int
            )
            if (new == labels).all():
                break
            labels = new
            centres = [
                points[labels == i].mean(axis=0) if (labels == i).any() else centres[i]
                for i in range(k)
            ]
        if inertia(points, labels) < best:
            best, best_labels = inertia(points, labels), labels
    return best_labels, best


@pytest.fixture
def slow_mbc() -> Callable:
    """(rows, names, k, sparsity) -> (groups, cosines, inertia), with no code of adaptlib.

    `starts` gives the starts from (cosines, k); 30 of k-means++ where it is not given."""

    def run(rows, names, k, sparsity=0.5, starts=None):
        cosines = slow_cosines(rows, sparsity)
        begin = starts(cosines, k) if starts else slow_starts(cosines, k, 30)
        labels, least = slow_kmeans(cosines, k, begin)
        groups = {
            frozenset(n for n, other in zip(names, labels, strict=True) if other == label)
            for label in labels.tolist()
        }
        return groups, cosines, least

    return run


@pytest.fixture
def inertia_of() -> Callable:
    """(cosines, sorted names, groups) -> the inertia of these groups."""

    def run(cosines, names, groups):
        label = {name: i for i, group in enumerate(groups) for name in group}
        return inertia(cosines, np.array([label[name] for name in names]))

    return run
