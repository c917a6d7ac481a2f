"""Two clusterings side by side: against brute force, and in cases that can be read."""

import itertools
import random

import pytest
from sklearn.metrics import adjusted_rand_score

from adaptlib.clustering.compare import Move, agreement, compare
from adaptlib.errors import UsageError


def shuffled(seed, n=30, k=4):
    chosen = random.Random(seed)
    labels = [chosen.randrange(k) for _ in range(n)]
    return {
        str(label): [f"e{i}" for i, other in enumerate(labels) if other == label]
        for label in range(k)
        if label in labels
    }


def test_another_name_is_no_move():
    before = {"0": ["a", "b", "c"], "1": ["d", "e"]}
    found = compare(before, {"x": ["d", "e"], "y": ["a", "b", "c"]})
    assert found.matched == {"0": "y", "1": "x"}
    assert found.same
    assert (found.moved, found.split, found.merged) == ((), {}, {})
    assert (found.ari, found.nmi) == (1, 1)
    assert compare(before, before).same


def test_a_move():
    found = compare(
        {"0": ["a", "b", "c"], "1": ["d", "e"]}, {"0": ["a", "b"], "1": ["c", "d", "e"]}
    )
    assert found.moved == (Move("c", "0", "1"),)
    assert not found.same
    assert found.ari is not None
    assert found.ari < 1


@pytest.mark.parametrize("seed", range(6))
def test_as_many_stay_as_can(seed):
    """Against all ways to match labels."""
    before, after = shuffled(seed), shuffled(seed + 100, k=3)
    best = 0
    for order in itertools.permutations([*after, None], len(before)):
        held = [set(before[a]) & set(after[b]) for a, b in zip(before, order, strict=True) if b]
        best = max(best, sum(map(len, held)))
    found = compare(before, after)
    assert len(found.moved) == 30 - best
    where = {name: label for label, names in after.items() for name in names}
    was = {name: label for label, names in before.items() for name in names}
    names = sorted(where)
    assert found.ari == pytest.approx(
        adjusted_rand_score([was[n] for n in names], [where[n] for n in names])
    )


def test_split_and_merged():
    eight = list("abcdefgh")
    found = compare({"0": eight}, {"0": eight[:4], "1": eight[4:7], "2": eight[7:]})
    assert found.split == {"0": {"0": 4, "1": 3}}  # one expert that left is no part
    assert found.merged == {}
    assert found.new == ("1", "2")
    assert [move.name for move in found.moved] == list("efgh")
    back = compare({"0": eight[:4], "1": eight[4:7], "2": eight[7:]}, {"0": eight})
    assert back.merged == {"0": {"0": 4, "1": 3}}
    assert back.split == {}
    assert back.gone == ("1", "2")


def test_outliers_are_no_cluster():
    before, after = {"0": ["a", "b"]}, {"0": ["a", "c"]}
    found = compare(before, after, outliers=(["c", "d", "e"], ["b", "d", "e"]))
    assert found.moved == (Move("b", "0", None), Move("c", None, "0"))
    alone = compare({}, {}, outliers=(["a", "b"], ["a", "b"]))
    assert alone.same
    assert alone.ari == 1  # both say that no two are alike


def test_experts_in_one_only_and_changed_ones():
    digests = ({"a": "x", "b": "y", "gone": "z"}, {"a": "x", "b": "new", "fresh": "w"})
    found = compare({"0": ["a", "b", "gone"]}, {"0": ["a", "b", "fresh"]}, digests=digests)
    assert (found.only_before, found.only_after) == (("gone",), ("fresh",))
    assert found.changed == ("b",)
    assert found.moved == ()
    assert not found.same
    assert found.common == 2
    assert compare({"0": ["a"]}, {"0": ["a"]}, digests=({"a": "x"}, {})).changed == ()


def test_nothing_in_common():
    found = compare({"0": ["a", "b"]}, {"0": ["c", "d"], "1": ["e"]})
    assert (found.common, found.ari, found.nmi) == (0, None, None)
    assert (found.matched, found.gone, found.new) == ({}, ("0",), ("0", "1"))


def test_an_expert_in_two_clusters():
    with pytest.raises(UsageError, match="'a' is in two clusters, '0' and '1'"):
        compare({"0": ["a"], "1": ["a"]}, {"0": ["a"]})


def test_agreement_of_any_labels():
    assert agreement([1, 1, 2, 2], ["b", "b", "a", "a"]) == (1, 1)
    assert agreement([1], [1]) == (None, None)
    ari, nmi = agreement([0, 0, 1, 1], [0, 1, 0, 1])
    assert ari == pytest.approx(-0.5)
    assert nmi == pytest.approx(0, abs=1e-9)
