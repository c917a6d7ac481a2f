"""Near-duplicates against every pair written out, and what is one expert and what is not."""

import tracemalloc

import numpy as np
import pytest

from adaptlib.clustering import duplicates as module
from adaptlib.clustering.duplicates import THRESHOLD, near_duplicates
from adaptlib.errors import RefusedError, UsageError


def planted(seed=0, families=(5, 3, 2, 1, 1, 1), width=300, noise=0.05):
    """Rows around one direction a family, shuffled; the noise is a share of the norm."""
    random = np.random.default_rng(seed)
    rows = []
    for size in families:
        centre = random.standard_normal(width)
        for _ in range(size):
            rows.append(centre + noise * random.standard_normal(width))
    order = random.permutation(len(rows))
    names = [f"e{i:03}" for i in range(len(rows))]
    return names, np.array(rows, dtype=np.float32)[order]


def slow(names, rows, threshold, tolerance):
    """Every pair in float64, and groups by joining until nothing changes."""
    rows = rows.astype(np.float64)
    group = list(range(len(names)))
    for i in range(len(names)):
        for j in range(i):
            a, b = np.linalg.norm(rows[i]), np.linalg.norm(rows[j])
            near = abs(a - b) <= tolerance * max(a, b)
            if near and (a == b == 0 or (a and b and rows[i] @ rows[j] / a / b >= threshold)):
                group = [group[j] if g == group[i] else g for g in group]
    found = {}
    for name, g in zip(names, group, strict=True):
        found.setdefault(g, set()).add(name)
    return {frozenset(g) for g in found.values() if len(g) > 1}


def sets(groups):
    return {frozenset(group.names) for group in groups}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [40, 300, 900])
@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
def test_it_finds_what_all_pairs_find(seed, width, noise):
    names, rows = planted(seed, width=width, noise=noise)
    rows *= np.random.default_rng(seed).uniform(0.96, 1.04, (len(rows), 1)).astype(np.float32)
    for threshold in (0.9, 0.99):
        found = near_duplicates(names, rows, threshold=threshold)
        assert sets(found) == slow(names, rows, threshold, 0.05)


def test_small_chunks_change_nothing(monkeypatch):
    names, rows = planted(7, families=(9, 6, 4, 4, 3, *[1] * 30))
    whole = near_duplicates(names, rows)
    assert [len(group.names) for group in whole] == [9, 6, 4, 4, 3]
    for chunk in (1, 900, 5000):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert near_duplicates(names, rows) == whole


def test_the_least_cosine_is_said():
    names, rows = planted(1, families=(4, 1), noise=0.05)
    (group,) = near_duplicates(names, rows)
    held = [rows[names.index(name)].astype(np.float64) for name in group.names]
    cosines = [x @ held[0] / np.linalg.norm(x) / np.linalg.norm(held[0]) for x in held]
    assert group.cosine == pytest.approx(min(cosines), abs=1e-6)
    assert THRESHOLD < group.cosine < 0.9999


def test_rows_of_float16_with_scales_are_the_same_experts():
    names, rows = planted(2, noise=0.05)
    rows[1] *= 0.5
    scales = np.abs(rows).max(axis=1)
    halves = (rows / scales[:, None]).astype(np.float16)
    found = near_duplicates(names, halves, scales=scales)
    wanted = near_duplicates(names, rows)
    assert sets(found) == sets(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.cosine == pytest.approx(b.cosine, abs=1e-4)


def test_a_chain_is_one_group():
    """a and b are one, b and c are one; a and c alone are not."""
    angles = np.deg2rad([0, 7, 14, 90])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    (group,) = near_duplicates(list("abcd"), rows)
    assert group.names == ("a", "b", "c")
    assert group.cosine == pytest.approx(np.cos(angles[2]))


def test_half_an_expert_and_its_opposite_are_others():
    _, rows = planted(families=(1, 1))
    one = rows[:1]
    rows = np.concatenate([one, 0.5 * one, -one, 1.02 * one, 1.2 * one])
    (group,) = near_duplicates(list("abcde"), rows)
    assert group.names == ("a", "d")
    assert near_duplicates(list("abcde"), rows, tolerance=0.01) == []
    (all_but_c,) = near_duplicates(list("abcde"), rows, tolerance=0.6)
    assert all_but_c.names == ("a", "b", "d", "e")


def test_exact_copies_are_named():
    _, rows = planted(families=(1, 1), noise=0)
    rows = np.concatenate([rows[:1]] * 5 + [rows[1:]])
    digests = dict(zip("abcdef", ["x", "y", "x", "y", "z", "w"], strict=True))
    (group,) = near_duplicates(list("abcdef"), rows, digests=digests)
    assert group.names == tuple("abcde")
    assert group.copies == (("a", "c"), ("b", "d"))
    assert group.cosine == pytest.approx(1, abs=1e-6)


def test_copies_are_one_whatever_the_threshold():
    _, rows = planted(families=(1, 1), width=1000, noise=0)
    rows = np.concatenate([rows, rows])
    digests = dict(zip("abcd", "xyxy", strict=True))
    found = near_duplicates(list("abcd"), rows, digests=digests, threshold=1.0)
    assert sets(found) == {frozenset("ac"), frozenset("bd")}


def test_zero_experts_are_one():
    rows = np.zeros((4, 8), dtype=np.float32)
    rows[3] = 1
    (group,) = near_duplicates(list("abcd"), rows)
    assert group.names == ("a", "b", "c")


def test_none_and_one():
    assert near_duplicates([], np.zeros((0, 4), dtype=np.float32)) == []
    assert near_duplicates(["a"], np.ones((1, 4), dtype=np.float32)) == []


@pytest.mark.parametrize("alike", [False, True])
def test_no_array_of_all_pairs_is_made(alike):
    """One byte for each pair of 6,000 experts would be 36 MB, one number of float32 144 MB."""
    names, rows = planted(families=(6000,) if alike else (1,) * 6000, width=64, noise=0.05)
    before = rows.copy()
    tracemalloc.start()
    found = near_duplicates(names, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == alike
    assert np.array_equal(rows, before)
    assert peak < (100e6 if alike else 36e6)


def test_bad_input():
    names, rows = planted()
    for threshold in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="the threshold is a cosine"):
            near_duplicates(names, rows, threshold=threshold)
    for tolerance in (-0.1, 1.0):
        with pytest.raises(UsageError, match="the tolerance is a share"):
            near_duplicates(names, rows, tolerance=tolerance)
    rows[3, 2] = np.nan
    with pytest.raises(RefusedError, match="'e003' holds NaN"):
        near_duplicates(names, rows)
