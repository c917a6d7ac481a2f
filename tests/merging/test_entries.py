"""Merges by entries against loops over the entries (slow.py)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlib.errors import UsageError
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.merging import MERGES, Part, entries, trim
from adaptlib.merging.draws import draws, survivors, words
from adaptlib.merging.largest import index_of_largest
from tests.merging.slow import SLOW, held, kept_count, largest, matrix
from tests.tiny import lora, sparse

SHAPE = {"d_out": 32, "d_in": 48}
SIZE = 32 * 48


def part_of(*deltas, weights=None, places=None, count=None, module="m"):
    n = len(deltas)
    weights = (1.0,) * n if weights is None else tuple(weights)
    places = tuple(range(n)) if places is None else places
    return Part(module, deltas, weights, n if count is None else count, places)


def blocks(seed, n=3):
    return sparse(seed, n=n, block=16, **SHAPE)


def elements(seed, n=300):
    return sparse(seed, n=n, **SHAPE)


def full(delta):
    """The same matrix as a sparse update of all positions."""
    w = delta.dense()
    return SparseDelta(torch.arange(w.numel()), w.reshape(-1), tuple(w.shape))


def few(seed, kinds=3):
    """LoRA with many entries of one size, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-kinds // 2, kinds // 2 + 1, (2, 48), generator=generator).float()
    b = torch.randint(-kinds // 2, kinds // 2 + 1, (32, 2), generator=generator).float()
    return LoRADelta(a, b, 0.5)


PARTS = {
    "lora": lambda: part_of(*(lora(i, rank=3, **SHAPE) for i in range(4))),
    "lora of several ranks": lambda: part_of(*(lora(i, rank=i + 1, **SHAPE) for i in range(3))),
    "lora in bfloat16": lambda: part_of(
        *(lora(i, dtype=torch.bfloat16, **SHAPE) for i in range(3)), weights=(0.5, 0.25, 2.0)
    ),
    "one lora": lambda: part_of(lora(3, **SHAPE), weights=(0.7,)),
    "one lora twice": lambda: part_of(lora(3, **SHAPE), lora(3, **SHAPE)),
    "a lora and its negative": lambda: part_of(
        lora(3, **SHAPE), replace(lora(3, **SHAPE), scale=-lora(3).scale)
    ),
    "lora with few sizes": lambda: part_of(*(few(i) for i in range(4))),
    "zero lora": lambda: part_of(*(replace(lora(i, **SHAPE), scale=0.0) for i in range(2))),
    "zero and lora": lambda: part_of(replace(lora(0, **SHAPE), scale=0.0), lora(1, **SHAPE)),
    "negative weights": lambda: part_of(
        *(lora(i, **SHAPE) for i in range(3)), weights=(1.0, -0.5, 0.25)
    ),
    "weights that sum to zero": lambda: part_of(
        lora(0, **SHAPE), lora(0, **SHAPE), weights=(1.0, -1.0)
    ),
    "one lacks the module": lambda: part_of(
        lora(0, **SHAPE), lora(2, **SHAPE), places=(0, 2), count=3, weights=(0.5, 2.0)
    ),
    "the first lack the module": lambda: part_of(
        lora(0, **SHAPE), elements(1), places=(2, 3), count=5
    ),
    "sparse": lambda: part_of(*(elements(i) for i in range(4)), weights=(1.0, 0.5, 0.25, 2.0)),
    "dense sparse": lambda: part_of(*(elements(i, n=1200) for i in range(3))),
    "few entries": lambda: part_of(elements(0, n=2), elements(1, n=0), elements(2, n=1)),
    "sparse without entries": lambda: part_of(elements(0, n=0), elements(1, n=0)),
    "sparse of few sizes": lambda: part_of(
        *(replace(elements(i, n=900), values=torch.ones(900).neg().pow(i)) for i in range(3))
    ),
    "sparse of zeros": lambda: part_of(
        replace(elements(0), values=torch.zeros(300)), elements(1), elements(2, n=900)
    ),
    "blocks": lambda: part_of(*(blocks(i) for i in range(3))),
    "blocks of one size": lambda: part_of(
        *(replace(blocks(i, n=2), values=torch.ones(2, 16, 16) / (i + 1)) for i in range(3))
    ),
    "no blocks": lambda: part_of(blocks(0, n=0)),
    "blocks and elements": lambda: part_of(blocks(0), elements(1), blocks(2, n=6)),
    "all kinds": lambda: part_of(
        lora(0, **SHAPE), elements(1), blocks(2), few(3), weights=(1.0, 0.5, 0.25, 2.0)
    ),
}
OPTIONS = {
    "breadcrumbs": [{}, {"beta": 0.0, "gamma": 1.0}, {"beta": 0.3, "gamma": 0.5, "scale": 2.0}],
    "dare_linear": [{}, {"density": 1.0}, {"density": 0.51, "seed": 3}],
    "dare_ties": [{}, {"density": 0.7, "elect": "frequency", "scale": -2.0, "seed": 1}],
    "della": [{}, {"density": 0.5, "epsilon": 0.5 - 1e-9, "elect": "none"}, {"epsilon": 0.0}],
    "magnitude_prune": [{}, {"density": 1.0}, {"density": 1e-9}, {"density": 0.6}],
    "slerp": [{}, {"t": 0.0}, {"t": 1.0}, {"t": 0.3}],
    "ties": [{}, {"density": 1.0, "elect": "frequency"}, {"density": 0.6, "scale": 0.4}],
    "uniform_sparse": [{}, {"scale": 0.5}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{','.join(map(str, o.values()))}" for n, o in CASES]
)
every_part = pytest.mark.parametrize("which", PARTS, ids=lambda which: which.replace(" ", "-"))


def dense(update):
    return (update if isinstance(update, torch.Tensor) else update.dense()).double().numpy()


def check(name, part, options):
    got = MERGES[name].formula(part, **options)
    wanted = SLOW[name](part, **options)
    np.testing.assert_allclose(dense(got), wanted, rtol=1e-5, atol=1e-5)
    return got


def test_all_of_them_are_here():
    assert OPTIONS.keys() == SLOW.keys()
    assert OPTIONS.keys() <= MERGES.keys()


@every_part
@every_case
def test_the_formula(name, options, which):
    part = PARTS[which]()
    before = [matrix(delta) for delta in part.deltas]
    got = check(name, part, options)
    assert all(np.array_equal(matrix(d), w) for d, w in zip(part.deltas, before, strict=True))
    if all(isinstance(delta, SparseDelta) for delta in part.deltas):
        assert isinstance(got, SparseDelta)
        everywhere = np.logical_or.reduce([held(delta) for delta in part.deltas])
        assert not (held(got) & ~everywhere).any()
        assert got.block == (16 if {delta.block for delta in part.deltas} == {16} else 1)
    if any(isinstance(delta, LoRADelta) for delta in part.deltas) and name != "slerp":
        assert isinstance(got, torch.Tensor)


@every_part
@pytest.mark.parametrize("name", OPTIONS)
def test_it_does_not_matter_how_it_is_cut_into_chunks(name, which, monkeypatch):
    monkeypatch.setattr(entries, "CHUNK", 90)
    monkeypatch.setattr(entries, "ROWS", 3)
    check(name, PARTS[which](), OPTIONS[name][-1])


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "deltas",
    [
        lambda: [lora(i, rank=3, **SHAPE) for i in range(3)],
        lambda: [few(i) for i in range(3)],
        lambda: [few(i, kinds=9) for i in range(3)],
        lambda: [replace(few(0), scale=0.0), lora(0, **SHAPE)],
        lambda: [LoRADelta(torch.ones(1, 48), torch.ones(32, 1))] * 2,
        lambda: [LoRADelta(torch.ones(1, 48), (torch.arange(32) == 3).float()[:, None])],
        lambda: [LoRADelta(torch.ones(1, 48), 1.0 + (torch.arange(32) == 3).float()[:, None])],
        lambda: [lora(0, **SHAPE), elements(1, n=900), few(2)],
    ],
    ids=["lora", "few-sizes", "some-sizes", "zeros", "ones", "one-row", "two-sizes", "mixed"],
)
@pytest.mark.parametrize("sample", [1, 40, 4000])
def test_cuts_by_a_sample(sample, deltas, density, monkeypatch):
    """Whatever the sample said, exactly so many are kept, and of equal ones the first."""
    monkeypatch.setattr(trim, "SMALL", 0)
    monkeypatch.setattr(trim, "SAMPLE", sample)
    monkeypatch.setattr(entries, "CHUNK", 300)
    monkeypatch.setattr(entries, "ROWS", 4)
    part = part_of(*deltas())
    check("ties", part, {"density": density})
    check("breadcrumbs", part, {"beta": density / 2, "gamma": density})
    for delta in part.deltas:
        got = MERGES["magnitude_prune"].formula(part_of(delta), density=density)
        some = np.count_nonzero(matrix(delta))
        assert np.count_nonzero(dense(got)) == min(kept_count(matrix(delta), density), some)


def test_a_sample_saves_the_look_at_all_entries(monkeypatch):
    monkeypatch.setattr(trim, "SMALL", 100)
    monkeypatch.setattr(trim, "SAMPLE", 4000)
    part = part_of(lora(0, rank=4, d_out=160, d_in=200), lora(1, rank=4, d_out=160, d_in=200))
    brackets = {(i, 6400): trim._bracket(trim._sample(part.deltas[i]), 0.2) for i in (0, 1)}
    for (i, count), (above, inside) in trim._between(part, brackets).items():
        sizes = np.sort(np.abs(matrix(part.deltas[i])).reshape(-1))[::-1]
        low, high = brackets[i, count]
        assert low < sizes[count - 1] < high
        there = sum(map(len, inside))
        assert above == pytest.approx((sizes >= high).sum(), abs=1)  # the sample's own rounding
        assert above < count <= above + there
        assert there == pytest.approx(((sizes > low) & (sizes < high)).sum(), abs=2)
        assert there < 2500


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    name=st.sampled_from(sorted(OPTIONS.keys() - {"uniform_sparse"})),
    which=st.lists(st.sampled_from(["lora", "elements", "blocks", "few"]), min_size=1, max_size=4),
)
def test_only_the_matrices_matter(seed, name, which):
    """As LoRA, or the same matrix with all its positions kept: the same merge."""
    make = {
        "lora": lambda s: lora(s, **SHAPE),
        "elements": elements,
        "blocks": blocks,
        "few": few,
    }
    deltas = [make[kind](seed + i) for i, kind in enumerate(which)]
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(len(deltas)).tolist()
    one = MERGES[name].formula(part_of(*deltas, weights=weights))
    other = MERGES[name].formula(part_of(*map(full, deltas), weights=weights))
    np.testing.assert_allclose(dense(one), dense(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "elements", "mixed"])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_the_experts_matrices_are_never_there_whole(kind, whole_rows, monkeypatch):
    monkeypatch.setattr(entries, "CHUNK", 3000)
    monkeypatch.setattr(entries, "ROWS", 2)
    deltas = [
        sparse(i, n=400, d_out=64, d_in=100)
        if kind == "elements" or (kind == "mixed" and i % 2)
        else lora(i, d_out=64, d_in=100)
        for i in range(20)
    ]
    seen = np.zeros(6400, dtype=int)
    for chunk in entries.chunks(part_of(*deltas), whole_rows=whole_rows):
        assert chunk.values.numel() <= (3000 if kind == "lora" and not whole_rows else 4000)
        seen[chunk.positions().numpy()] += 1
        assert chunk.first <= chunk.positions().min() <= chunk.positions().max() <= chunk.final
    wanted = 1 if kind != "elements" else np.logical_or.reduce([held(d) for d in deltas])
    assert np.array_equal(seen, np.broadcast_to(wanted, (64, 100)).reshape(-1))


# --- single merges ---------------------------------------------------------------------------


def test_the_sparse_merge_of_the_paper_by_hand():
    one = SparseDelta(torch.tensor([0, 1]), torch.tensor([2.0, 3.0]), (2, 3))
    other = SparseDelta(torch.tensor([1, 5]), torch.tensor([5.0, 7.0]), (2, 3))
    got = MERGES["uniform_sparse"].formula(part_of(one, other))
    assert torch.equal(got.dense(), torch.tensor([[2.0, 4, 0], [0, 0, 7]]))


def test_a_held_zero_counts_in_the_sparse_merge_and_a_zero_of_lora_does_not():
    held_zero = SparseDelta(torch.tensor([1]), torch.tensor([0.0]), (1, 3))
    one = SparseDelta(torch.tensor([1, 2]), torch.tensor([4.0, 6.0]), (1, 3))
    zero = LoRADelta(torch.tensor([[0.0, 0.0, 2.0]]), torch.ones(1, 1))
    formula = MERGES["uniform_sparse"].formula
    assert formula(part_of(held_zero, one)).dense().tolist() == [[0, 2, 6]]
    assert formula(part_of(zero, one)).tolist() == [[0, 4, 4]]
    assert formula(part_of(zero, one, held_zero)).tolist() == [[0, 2, 4]]


def test_ties_by_hand():
    a = torch.tensor([[4.0, -3, 1, 0]])
    b = torch.tensor([[-1.0, -5, 3, 0]])
    c = torch.tensor([[-2.0, 4, 1, 0]])
    deltas = [LoRADelta(x, torch.ones(1, 1)) for x in (a, b, c)]
    got = MERGES["ties"].formula(part_of(*deltas), density=0.5)
    # trimmed: 4 -3 | -5 3 | -2 4; signs + - +; means of what agrees: 4, (-3-5)/2, 3
    assert got.tolist() == [[4, -4, 3, 0]]


def test_trimming_one_expert_keeps_exactly_the_share():
    part = PARTS["one lora"]()
    got = MERGES["magnitude_prune"].formula(part, density=0.3)
    assert got.count_nonzero() == int(0.3 * SIZE)


def test_slerp_of_two_of_one_size_keeps_the_size_and_the_angle():
    one, other = lora(0, **SHAPE), lora(1, **SHAPE)
    other = replace(other, scale=other.scale * one.norm() / other.norm())
    got = MERGES["slerp"].formula(part_of(one, other), t=0.25)
    angle = math.acos(one.inner(other) / one.norm() ** 2)
    assert got.norm() == pytest.approx(one.norm(), rel=1e-5)
    assert math.acos(got.inner(one) / one.norm() ** 2) == pytest.approx(angle / 4, rel=1e-4)


def test_slerp_of_lora_is_exact_in_factor_space():
    got = MERGES["slerp"].formula(PARTS["lora"]())
    assert isinstance(got, LoRADelta)
    assert got.rank == 12


def test_an_expert_that_lacks_the_module_is_a_zero_for_slerp():
    zero = replace(lora(1, **SHAPE), scale=0.0)
    one, other = lora(0, **SHAPE), lora(2, **SHAPE)
    lacking = MERGES["slerp"].formula(part_of(one, other, places=(0, 2), count=3))
    there = MERGES["slerp"].formula(part_of(one, zero, other))
    np.testing.assert_allclose(dense(lacking), dense(there), atol=1e-5)


# --- random merges -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_on_average_over_seeds_nothing_changes(name):
    part = part_of(lora(0), sparse(1), weights=(0.5, 2.0))
    options = {"density": 0.4} | ({"elect": "none"} if name == "della" else {})
    wanted = 0.5 * matrix(part.deltas[0]) + 2 * matrix(part.deltas[1])
    runs = np.stack(
        [dense(MERGES[name].formula(part, seed=seed, **options)) for seed in range(600)]
    )
    error = runs.std(axis=0) / math.sqrt(len(runs))
    assert (np.abs(runs.mean(axis=0) - wanted) < 4.5 * error + 1e-6).all()
    assert (error[wanted != 0] > 0).all()


def test_dropped_entries_are_the_share_and_differ_between_experts_modules_and_seeds():
    delta = LoRADelta(torch.ones(1, 200), torch.ones(300, 1))
    formula = MERGES["dare_linear"].formula

    def mask(i, module="m", seed=0):
        part = part_of(delta, places=(i,), count=3, module=module)
        return dense(formula(part, density=0.3, seed=seed)) > 0

    masks = [mask(0), mask(1), mask(0, module="n"), mask(0, seed=1)]
    for one in masks:
        assert abs(one.mean() - 0.3) < 4 * math.sqrt(0.21 / one.size)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            both = (one & other).mean()
            assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / one.size)
    assert np.array_equal(mask(0), mask(0))


def test_what_is_dropped_of_an_expert_does_not_depend_on_the_others():
    zero = replace(lora(1, **SHAPE), scale=0.0)
    alone = MERGES["dare_linear"].formula(part_of(lora(0, **SHAPE)))
    among = MERGES["dare_linear"].formula(part_of(lora(0, **SHAPE), zero))
    assert torch.equal(alone, among)


def test_della_keeps_large_entries_more_often():
    w = torch.linspace(1, 2, 400)[None]
    part = part_of(LoRADelta(w, torch.ones(1000, 1)))
    got = dense(MERGES["della"].formula(part, density=0.5, epsilon=0.3)) != 0
    chances = 0.2 + 0.6 * np.arange(400) / 399
    assert abs(got.mean() - 0.5) < 0.005
    assert (np.abs(got.mean(axis=0) - chances) < 4.5 * np.sqrt(chances * (1 - chances) / 1e3)).all()


def test_words_are_splitmix64():
    def splitmix(seed, count):
        state, mask = seed, 2**64 - 1
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = state
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    assert next(splitmix(1234567, 1)) == 6457827717110365317  # as its authors' code prints
    for seed in (0, 1234567, 2**64 - 1):
        assert words(seed, np.arange(9, dtype=np.uint64)).tolist() == list(splitmix(seed, 9))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_draws_are_of_the_position(kind):
    everything = draws(5, range(100), kind)
    assert len(set(everything.tolist())) > 50
    for start, stop in ((0, 1), (3, 29), (16, 32), (99, 100), (7, 7)):
        assert np.array_equal(draws(5, range(start, stop), kind), everything[start:stop])
    places = np.array([0, 5, 6, 63, 64, 99])
    assert np.array_equal(draws(5, places, kind), everything[places])


@pytest.mark.parametrize("share", [1e-7, 0.001, 1 / 256, 0.2, 0.5, 0.999, 1.0])
def test_survivors_are_the_share_and_of_the_position(share):
    found = survivors(9, share, range(1_000_000))
    assert abs(found.sum() - 1e6 * share) <= 4 * math.sqrt(1e6 * share * (1 - share)) + 1
    places = np.arange(0, 1_000_000, 37)
    assert np.array_equal(survivors(9, share, places), found[places])
    assert np.array_equal(survivors(9, share, range(12345, 20000)), found[12345:20000])


# --- what else --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 12, 40])
def test_index_of_largest(count):
    values = torch.tensor([1.0, -3, 2, 3, -1, 2, 0, -2, 3, 0, 1, 2])
    wanted = np.flatnonzero(largest(values.numpy(), count))
    assert index_of_largest(values, count).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ties", {"density": 0.0}, "density is a share, above 0 and at most 1; got 0.0"),
        ("ties", {"density": 1.5}, "got 1.5"),
        ("ties", {"density": math.nan}, "got nan"),
        ("ties", {"elect": "sum"}, "elect is one of total, frequency, none; got 'sum'"),
        ("magnitude_prune", {"density": -0.1}, "density"),
        ("dare_linear", {"density": 0.0}, "density"),
        ("dare_ties", {"elect": "no"}, "elect"),
        ("della", {"density": 2.0}, "density"),
        ("della", {"epsilon": 0.2}, "epsilon is from 0, below density"),
        ("della", {"density": 0.95, "epsilon": 0.1}, "at most 1; got epsilon 0.1, density 0.95"),
        ("breadcrumbs", {"beta": -0.1}, "beta is a share, from 0 and at most 1; got -0.1"),
        ("breadcrumbs", {"gamma": 0.0}, "gamma"),
        ("breadcrumbs", {"beta": 0.9, "gamma": 0.9}, "beta is below gamma"),
        ("slerp", {"t": 1.1}, "t is a share"),
    ],
)
def test_options_that_do_not_fit(name, options, said):
    experts = {"one": Expert("base", {"m": lora(0)}), "two": Expert("base", {"m": lora(1)})}
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        MERGES[name](experts, **options)
