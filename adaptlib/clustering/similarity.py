"""How alike experts are: the cosine matrix that MBC groups by."""

import numpy as np
from jaxtyping import Bool, Float
from sklearn.utils.extmath import randomized_svd

COMPONENTS = 64
CHUNK = 1 << 20  # entries handled at once in float64
SAME = 1e-10  # experts whose cosine is nearer to 1 than this are one point


def cosine_matrix(
    matrix: Float[np.ndarray, "expert feature"], *, sparsity: float | None = 0.5, seed: int = 0
) -> Float[np.ndarray, "expert expert"]:
    """How alike each two experts are, from -1 to 1, by the first 64 components of their rows.

    In each row the entries with |θ| <= quantile(|θ|, sparsity) count as zero (None: none do); a
    randomized SVD keeps min(64, experts, features) components; rows are normalised and multiplied.
    An expert that is zero has cosine 0 with all, itself included. `matrix` is neither changed nor
    copied. Model-based clustering of Ostapenko et al. 2024 (arXiv:2405.11157), as in the authors'
    code.
    """
    gram = _gram(matrix, sparsity)
    values, vectors = np.linalg.eigh(gram)
    # What is below the rounding of the largest expert is zero, not a direction.
    floor = max(values[-1], 0.0) * len(gram) * np.finfo(float).eps
    zero = gram.diagonal() <= floor
    # X = root W with root symmetric and the rows of W orthonormal. So the randomized SVD of Xᵀ,
    # which is what scikit-learn's TruncatedSVD runs for a wide X, is that of root, turned by Wᵀ:
    # one draw, the same embedding, without (feature, component) arrays several times as large as X.
    root = (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T
    directions, _, _ = randomized_svd(
        root,
        min(COMPONENTS, *matrix.shape),
        n_oversamples=10,
        n_iter=5,  # pyright: ignore[reportArgumentType]: its default is a string, it takes both
        random_state=seed,
    )
    embedding = root @ directions
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    zero |= norm[:, 0] == 0  # also what lies wholly outside the components
    unit = np.where(zero[:, None], 0.0, embedding / np.where(norm == 0, 1.0, norm))
    return _merge_equals(np.clip(unit @ unit.T, -1.0, 1.0), zero)


def _gram(
    matrix: Float[np.ndarray, "expert feature"], sparsity: float | None
) -> Float[np.ndarray, "expert expert"]:
    """X Xᵀ in float64, chunk by chunk, X being `matrix` with its small entries zeroed."""
    if sparsity is None:
        cut = np.full((len(matrix), 1), -1.0)
    else:
        cut = np.array([[np.quantile(np.abs(row), sparsity)] for row in matrix])
    gram = np.zeros((len(matrix), len(matrix)))
    step = max(1, CHUNK // len(matrix))  # columns
    for i in range(0, matrix.shape[1], step):
        chunk = matrix[:, i : i + step]
        kept = np.where(np.abs(chunk) <= cut, 0.0, chunk).astype(np.float64)
        gram += kept @ kept.T
    return gram


def _merge_equals(
    similarity: Float[np.ndarray, "expert expert"], zero: Bool[np.ndarray, " expert"]
) -> Float[np.ndarray, "expert expert"]:
    """Give equal experts rows that are equal to the last bit, so that no grouping can part them."""
    same = (similarity >= 1 - SAME) | np.outer(zero, zero)
    first = same.argmax(axis=1)
    return similarity[np.ix_(first, first)]
