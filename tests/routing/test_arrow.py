"""Arrow's prototypes and choices against the dense SVD."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaptlib import Arrow, Expert, LoRADelta, Named
from adaptlib.errors import NotFoundError, UsageError


def loras(seed, *, count=5, rank=4, d_in=24, d_out=16):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        f"e{i}": Expert("m", {"q": LoRADelta(draw(rank, d_in), draw(d_out, rank), 0.5)})
        for i in range(count)
    }


def test_prototypes_are_the_top_right_singular_vectors(llama, mixed):
    experts = mixed(llama)
    names = list(experts)
    router = Arrow.fit(experts)
    for module, rows in router.prototypes.items():
        for i, row in zip(router.columns[module], rows, strict=True):
            wanted = torch.linalg.svd(experts[names[i]].deltas[module].dense().double()).Vh[0]
            assert abs(row.double() @ wanted) > 1 - 1e-6


def test_logits_are_absolute_not_normalised_and_divided_by_the_temperature():
    prototypes = {"q": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])}
    router = Arrow(
        experts=("a", "b", "c"),
        columns={"q": (0, 1, 2)},
        mix="outputs",
        prototypes=prototypes,
        top_k=2,
        temperature=2.0,
    )
    index, weight = router.route("q", torch.tensor([[1.0, -6.0, 4.0]]))
    assert index.tolist() == [[1, 2]]
    torch.testing.assert_close(weight, torch.tensor([[3.0, 2.0]]).softmax(-1))


def test_columns_count_all_experts_where_only_some_have_the_module():
    router = Arrow(
        experts=("a", "b", "c"),
        columns={"q": (0, 2)},
        mix="outputs",
        prototypes={"q": torch.eye(2)},
        top_k=3,
        temperature=1.0,
    )
    assert router.route("q", torch.tensor([[1.0, 2.0]])).index.tolist() == [[2, 0]]


def test_top_k_is_clamped_to_the_experts_there_are():
    assert Arrow.fit(loras(0), top_k=50).top_k == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k is 1 or more; got 0"),
        ({"temperature": 0.0}, "temperature is more than 0; got 0.0"),
        ({"temperature": float("nan")}, "temperature is more than 0; got nan"),
    ],
)
def test_options_that_cannot_be_meant(options, words):
    with pytest.raises(UsageError, match=words):
        Arrow.fit(loras(0), **options)


def test_prototypes_that_do_not_match_the_columns():
    options = {"experts": ("a",), "mix": "outputs", "top_k": 1, "temperature": 1.0}
    with pytest.raises(UsageError, match="different modules"):
        Arrow(columns={"q": (0,)}, prototypes={}, **options)
    with pytest.raises(UsageError, match=r"q wants prototypes \(1, d_in\).* got \(2, 3\)"):
        Arrow(columns={"q": (0,)}, prototypes={"q": torch.zeros(2, 3)}, **options)


def test_named_suggests_the_name_that_was_meant():
    with pytest.raises(NotFoundError, match="no expert 'e33' among 5: e0, e1, ") as caught:
        Named.fit(loras(0), expert="e33")
    assert caught.value.hint == "did you mean e3?"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6))
def test_the_choice_depends_on_the_update_not_on_its_factors(seed, rank):
    """ΔW = (B R⁻¹)(R A) for any invertible R, and v and -v are one prototype."""
    experts = loras(seed, rank=rank)
    generator = torch.Generator().manual_seed(seed + 1)
    turned = {}
    for name, expert in experts.items():
        delta = expert.deltas["q"]
        assert isinstance(delta, LoRADelta)
        orthogonal = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        r = (0.5 + torch.rand(rank, generator=generator))[:, None] * orthogonal
        b = torch.linalg.solve(r.double().T, delta.b.double().T).T.float()
        turned[name] = Expert("m", {"q": LoRADelta(r @ delta.a, b, delta.scale)})
    first, second = Arrow.fit(experts, top_k=5), Arrow.fit(turned, top_k=5)
    # where the two largest singular values all but meet, the direction itself is not defined
    for delta in (expert.deltas["q"] for expert in experts.values()):
        values = torch.linalg.svdvals(delta.dense().double())
        assume(values[1] < 0.98 * values[0])
    flipped = Arrow(
        experts=first.experts,
        columns=first.columns,
        mix=first.mix,
        prototypes={"q": -first.prototypes["q"]},
        top_k=5,
        temperature=1.0,
    )
    x = torch.randn(8, 24, generator=generator)

    def weights(router):
        index, weight = router.route("q", x)
        return torch.zeros(8, 5).scatter(1, index, weight)

    torch.testing.assert_close(weights(second), weights(first), atol=2e-4, rtol=0)
    torch.testing.assert_close(weights(flipped), weights(first))
