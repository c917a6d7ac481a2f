"""Random numbers by position: the same for an entry in whatever pieces a matrix is gone through."""

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SECOND = 0x5851F42D4C957F2D  # another stream from one seed

Where = range | NDArray[np.int64]  # flat positions


def words(seed: int, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The numbers at `index` of splitmix64 (Steele et al. 2014, figure 17) begun at `seed`: any of
    them costs the same, with no need of those before it."""
    z = (index + np.uint64(1)) * _STEP
    z += np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in zip((np.uint64(30), np.uint64(27)), _MIX, strict=True):
        z ^= z >> shift
        z *= factor
    z ^= z >> np.uint64(31)
    return z


def draws(seed: int, where: Where, kind: type[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """An unsigned number of few bits for each position, several cut from one word."""
    bits = 8 * np.dtype(kind).itemsize
    a_word = 64 // bits
    if isinstance(where, range):
        first = where.start // a_word
        found = words(seed, np.arange(first, -(-where.stop // a_word), dtype=np.uint64))
        pieces = found.astype("<u8", copy=False).view(np.dtype(kind).newbyteorder("<"))
        return pieces[where.start - first * a_word : where.stop - first * a_word]
    found = words(seed, (where // a_word).astype(np.uint64))
    found >>= (where % a_word * bits).astype(np.uint64)
    return found.astype(kind)


def survivors(seed: int, share: float, where: Where) -> NDArray[np.bool_]:
    """True with probability `share` at each position, exact to 2^-40. One byte decides, but where
    it is the byte on the border 32 more bits do: that is four times as fast as floats."""
    if share >= 1:
        return np.ones(len(where), dtype=bool)
    border = int(share * 256)
    bytes_ = draws(seed, where, np.uint8)
    alive = bytes_ < border
    open_ = np.flatnonzero(bytes_ == border)
    positions = where.start + open_ if isinstance(where, range) else where[open_]
    rest = words(seed ^ _SECOND, positions.astype(np.uint64)) >> np.uint64(32)
    alive[open_] = rest < np.uint64((share * 256 - border) * 2**32)
    return alive
