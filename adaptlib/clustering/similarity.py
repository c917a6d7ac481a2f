"""How alike experts are: unit rows whose inner products are the cosines that MBC groups by.

MBC runs K-means on the rows of S = E Eᵀ, the cosine matrix, E being the unit rows (expert,
component). S is never built for that: |S_i - S_j|² = (e_i - e_j)ᵀ EᵀE (e_i - e_j), so K-means on
the rows of P = E (EᵀE)^½ has the same distances, with 64 columns for any number of experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import ThreadpoolController

COMPONENTS = 64
CHUNK = 1 << 20  # entries handled at once in float64
SAME = 1e-10  # experts whose cosine is nearer to 1 than this are one point
OVERSAMPLES, POWER = 10, 5  # of the randomized SVD, as in the authors' code
MANY = 1024  # experts from which the SVD is that of the rows themselves, and not of their products


@final
@dataclass(frozen=True, eq=False)
class Embedding:
    """Where each expert stands, and what is said of it: all that a clustering may look at.

    `unit` are rows of length 1, so that `unit @ unit.T` are cosines; zeros for an expert that is
    zero. `points` are what MBC's K-means sees: their distances are those of the rows of the cosine
    matrix. Equal experts have rows that are equal to the last bit. `cards` is asked only by methods
    that read texts. Rows are in the order of `names`, which are sorted.
    """

    names: tuple[str, ...]
    unit: Float[np.ndarray, "expert component"]
    points: Float[np.ndarray, "expert component"]
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        names: tuple[str, ...],
        unit: Float[np.ndarray, "expert component"],
        cards: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "Embedding":
        """The embedding of these unit rows."""
        found = cls(names, unit, unit, cards or {})
        _, first, place = np.unique(unit, axis=0, return_index=True, return_inverse=True)
        points = unit @ found.turn  # a product may round equal rows differently
        return cls(names, unit, points[first[place.reshape(-1)]], found.cards)

    def __len__(self) -> int:
        return len(self.unit)

    def subset(self, rows: Int[np.ndarray, " some"]) -> "Embedding":
        """Some of the experts, as if there were no others."""
        return Embedding.of(tuple(self.names[i] for i in rows), self.unit[rows], self.cards)

    @cached_property
    def tree(self) -> Float[np.ndarray, "merge 4"]:
        """The dendrogram of average linkage on 1 - cos, as SciPy's `linkage` gives it."""
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import pdist

        gaps = pdist(self.apart, "sqeuclidean")
        gaps /= 2
        return linkage(gaps, "average")

    @property
    def turn(self) -> Float[np.ndarray, "component component"]:
        """(EᵀE)^½: `points` are `unit @ turn`."""
        values, vectors = np.linalg.eigh(self.unit.T @ self.unit)
        return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T

    @property
    def apart(self) -> Float[np.ndarray, "expert axis"]:
        """`unit` with one more axis, on which all zero experts stand: half the squared distance of
        two rows is 1 - cos, between a zero expert and another too."""
        zero = ~self.unit.any(axis=1)
        return np.column_stack([self.unit, zero.astype(np.float64)])


def cosines(unit: Float[np.ndarray, "expert component"]) -> Float[np.ndarray, "expert expert"]:
    """The cosine matrix of unit rows; equal rows give equal rows, to the last bit."""
    distinct, place = np.unique(unit, axis=0, return_inverse=True)
    place = place.reshape(-1)
    return np.clip(distinct @ distinct.T, -1.0, 1.0)[np.ix_(place, place)]


def cosine_matrix(
    matrix: Float[np.ndarray, "expert feature"], *, sparsity: float | None = 0.5, seed: int = 0
) -> Float[np.ndarray, "expert expert"]:
    """How alike each two experts are, from -1 to 1, by the first 64 components of their rows; see
    `embed`. An expert that is zero has cosine 0 with all, itself included."""
    return cosines(embed(matrix, sparsity=sparsity, seed=seed)[0])


def embed(
    matrix: Float[np.ndarray, "expert feature"],
    *,
    sparsity: float | None = 0.5,
    seed: int = 0,
    alike: bool = False,
    many: int = MANY,
) -> tuple[Float[np.ndarray, "expert component"], Float[np.ndarray, "basis component"]]:
    """Unit rows of min(64, experts, features) components, and what puts another row among them.

    In each row the entries with |θ| <= quantile(|θ|, sparsity) count as zero (None: none do); a
    randomized SVD keeps the components; rows are normalised. `matrix` is neither changed nor, up
    to `many` experts, copied. Model-based clustering of Ostapenko et al. 2024 (arXiv:2405.11157),
    as in the authors' code. With `alike` the rows are made of length 1 before the SVD: of many
    experts, those with large updates would otherwise take all components.

    The second array, W, places another row x: at x Xᵀ W up to `many` experts, where the SVD is that
    of X Xᵀ (a row of factors has millions of entries), and at x W above, where it is that of X.
    Both ways draw the same random numbers, so they end at the same components.
    """
    count = min(COMPONENTS, *matrix.shape)
    if len(matrix) <= many:
        return from_gram(_gram(matrix, sparsity), count, seed=seed, alike=alike)
    # By one thread, which takes 10 seconds of its core for 10,000 experts of 28,672 numbers: two of
    # them, on two cores that others used as well, waited for each other and took 60, and one 18.
    with threads().limit(limits=1):
        return _from_rows(matrix, count, sparsity, seed, alike)


def from_gram(
    gram: Float[np.ndarray, "expert expert"],
    count: int = COMPONENTS,
    *,
    seed: int = 0,
    alike: bool = True,
) -> tuple[Float[np.ndarray, "expert component"], Float[np.ndarray, "expert component"]]:
    """`embed` of experts of which only the inner products are known."""
    # What is below the rounding of the largest expert is zero, not a direction.
    square = gram.diagonal()
    zero = square <= max(square.max(), 0.0) * len(gram) * np.finfo(float).eps
    if alike:
        length = np.sqrt(np.where(zero, np.inf, square))
        gram = gram / length / length[:, None]
    values, vectors = np.linalg.eigh(gram)
    floor = max(values[-1], 0.0) * len(gram) * np.finfo(float).eps
    # X = root W with root symmetric and the rows of W orthonormal. So the randomized SVD of Xᵀ,
    # which is what scikit-learn's TruncatedSVD runs for a wide X, is that of root, turned by Wᵀ:
    # one draw, the same embedding, without (feature, component) arrays several times as large as X.
    roots = np.sqrt(np.where(values > floor, values, 0.0))
    root = (vectors * roots) @ vectors.T
    directions, _, _ = randomized_svd(
        root,
        min(count, len(gram)),
        n_oversamples=OVERSAMPLES,
        n_iter=POWER,  # pyright: ignore[reportArgumentType]: its default is a string, it takes both
        random_state=seed,
    )
    inverse = np.where(roots > 0, 1 / np.where(roots > 0, roots, 1.0), 0.0)
    weights = (vectors * inverse) @ (vectors.T @ directions)
    return _unit(root @ directions, zero), weights


def _from_rows(
    matrix: Float[np.ndarray, "expert feature"],
    count: int,
    sparsity: float | None,
    seed: int,
    alike: bool,
) -> tuple[Float[np.ndarray, "expert component"], Float[np.ndarray, "feature component"]]:
    """The randomized SVD of Xᵀ as scikit-learn's `randomized_svd` runs it (Halko et al. 2011,
    algorithm 4.4), with X read in chunks: in float32 to find the directions, in float64 to place
    the rows on them, for equal experts must be equal."""
    cut = _cut(matrix, sparsity)
    square = np.concatenate([(p.astype(np.float64) ** 2).sum(1) for _, p in _parts(matrix, cut)])
    zero = square <= square.max() * len(matrix) * np.finfo(float).eps
    length = np.sqrt(np.where(zero, np.inf, square if alike else 1.0))[:, None]
    draw = min(count + OVERSAMPLES, *matrix.shape)
    start = np.random.RandomState(seed).normal(size=(len(matrix), draw)).astype(np.float32)
    image = np.zeros((matrix.shape[1], draw), np.float32)
    for rows, part in _parts(matrix, cut):
        image += part.T @ (start[rows] / length[rows].astype(np.float32))
    for _ in range(POWER):
        basis, image = np.linalg.qr(image)[0], np.zeros_like(image)
        for rows, part in _parts(matrix, cut):
            image += part.T @ (part @ basis / (length[rows] ** 2).astype(np.float32))
    basis = np.linalg.qr(image.astype(np.float64))[0]
    embedding = np.empty((len(matrix), draw))
    for rows, part in _parts(matrix, cut):
        embedding[rows] = part.astype(np.float64) @ basis / length[rows]
    turn = np.linalg.svd(embedding, full_matrices=False)[2][:count].T
    return _unit(embedding @ turn, zero), basis @ turn


def _unit(
    embedding: Float[np.ndarray, "expert component"], zero: Bool[np.ndarray, " expert"]
) -> Float[np.ndarray, "expert component"]:
    """Rows of length 1, those that are equal to rounding equal to the last bit, so that no grouping
    can part them."""
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    zero = zero | (norm[:, 0] == 0)  # also what lies wholly outside the components
    unit = np.where(zero[:, None], 0.0, embedding / np.where(norm == 0, 1.0, norm))
    first = np.arange(len(unit))
    step = max(1, CHUNK // len(unit))  # rows; all of them at once are (expert, expert)
    for i in range(0, len(unit), step):
        same = unit[i : i + step] @ unit.T >= 1 - SAME
        first[i : i + step] = same.argmax(axis=1)
    first[zero] = zero.argmax() if zero.any() else 0
    return unit[first]


def feature_axes(
    matrix: Float[np.ndarray, "expert feature"], weights: Float[np.ndarray, "expert component"]
) -> Float[np.ndarray, "feature component"]:
    """What places another row x by x W alone, for weights that `embed` gave with `alike`."""
    found = np.zeros((matrix.shape[1], weights.shape[1]))
    for rows, part in _parts(matrix, None):
        wide = part.astype(np.float64)
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        found += wide.T @ (weights[rows] / np.where(length == 0, 1.0, length))
    return found


def kept_entries(
    matrix: Float[np.ndarray, "expert feature"], sparsity: float | None
) -> Float[np.ndarray, "expert feature"]:
    """The rows with their small entries zeroed, as `embed` sees them."""
    cut = _cut(matrix, sparsity)
    return matrix if cut is None else np.where(np.abs(matrix) <= cut, matrix.dtype.type(0), matrix)


def _cut(
    matrix: Float[np.ndarray, "expert feature"], sparsity: float | None
) -> Float[np.ndarray, "expert 1"] | None:
    """The size up to which entries of a row count as zero; None where none do."""
    if sparsity is None:
        return None
    return np.array([[np.quantile(np.abs(row), sparsity)] for row in matrix])


def _parts(
    matrix: Float[np.ndarray, "expert feature"], cut: Float[np.ndarray, "expert 1"] | None
) -> Iterator[tuple[slice, Float[np.ndarray, "some feature"]]]:
    """The rows in chunks, float32, small entries zeroed."""
    step = max(1, 4 * CHUNK // matrix.shape[1])
    for i in range(0, len(matrix), step):
        rows = slice(i, i + step)
        part = np.asarray(matrix[rows], np.float32)
        if cut is not None:
            part = np.where(np.abs(part) <= cut[rows], np.float32(0), part)
        yield rows, part


def _gram(
    matrix: Float[np.ndarray, "expert feature"], sparsity: float | None
) -> Float[np.ndarray, "expert expert"]:
    """X Xᵀ in float64, chunk by chunk, X being `matrix` with its small entries zeroed."""
    cut = _cut(matrix, sparsity)
    gram = np.zeros((len(matrix), len(matrix)))
    step = max(1, CHUNK // len(matrix))  # columns
    for i in range(0, matrix.shape[1], step):
        chunk = matrix[:, i : i + step]
        kept = chunk if cut is None else np.where(np.abs(chunk) <= cut, 0.0, chunk)
        kept = kept.astype(np.float64)
        gram += kept @ kept.T
    return gram


@cache
def threads() -> ThreadpoolController:
    """What limits the threads of BLAS and OpenMP; to find them takes as long as a small K-means."""
    return ThreadpoolController()
