"""Deltas against the dense matrix that they stand for, in float64."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts import Delta, Expert, LoRADelta, SparseDelta
from tests.tiny import lora, sparse

DELTAS: dict[str, Callable[[], Delta]] = {
    "lora of rank 1": lambda: lora(1, rank=1, d_out=6, d_in=9),
    "lora of rank 3": lambda: lora(2, rank=3, d_out=6, d_in=9),
    "lora of full rank": lambda: lora(3, rank=6, d_out=6, d_in=9),
    "lora of rank over d": lambda: lora(4, rank=12, d_out=6, d_in=9),
    "lora in bfloat16": lambda: lora(5, rank=3, d_out=6, d_in=9, dtype=torch.bfloat16),
    "lora in float16": lambda: lora(6, rank=3, d_out=6, d_in=9, dtype=torch.float16),
    "lora of zeros": lambda: LoRADelta(torch.randn(2, 9), torch.zeros(6, 2), 1.0),
    "lora of scale 0": lambda: LoRADelta(torch.ones(2, 9), torch.ones(6, 2), 0.0),
    "lora of scale -2": lambda: LoRADelta(lora(1).a, lora(1).b, -2.0),
    "sparse": lambda: sparse(1, n=11, d_out=6, d_in=9),
    "sparse of one entry": lambda: sparse(2, n=1, d_out=6, d_in=9),
    "sparse of every entry": lambda: sparse(3, n=54, d_out=6, d_in=9),
    "sparse of no entry": lambda: sparse(4, n=0, d_out=6, d_in=9),
    "sparse of zeros": lambda: SparseDelta(torch.tensor([3]), torch.zeros(1), (6, 9)),
    "sparse in bfloat16": lambda: SparseDelta(
        torch.tensor([0, 7, 53]), torch.tensor([1.5, -2, 0.1]).bfloat16(), (6, 9)
    ),
    "sparse and wide": lambda: sparse(5, n=80, d_out=40, d_in=70),
    "sparse and tall": lambda: sparse(6, n=200, d_out=70, d_in=40),
    "blocks": lambda: sparse(7, n=3, d_out=32, d_in=64, block=16),
    "blocks, larger": lambda: sparse(8, n=5, d_out=64, d_in=48, block=16),
    "no block": lambda: sparse(9, n=0, d_out=32, d_in=16, block=16),
}
every_delta = pytest.mark.parametrize("name", DELTAS, ids=lambda name: name.replace(" ", "-"))


def dense(delta: Delta) -> Tensor:
    """ΔW entry by entry, float64."""
    if isinstance(delta, LoRADelta):
        return delta.scale * torch.einsum("or,ri->oi", delta.b.double(), delta.a.double())
    assert isinstance(delta, SparseDelta)
    d_out, d_in = delta.shape
    w = torch.zeros(d_out, d_in, dtype=torch.float64)
    across = d_in // delta.block
    for position, value in zip(delta.index.tolist(), delta.values.double(), strict=True):
        if delta.block == 1:
            w[position // d_in, position % d_in] = value
        else:
            row, column = position // across * 16, position % across * 16
            w[row : row + 16, column : column + 16] = value
    return w


def test_a_tiny_sparse_delta_is_what_its_docstring_says() -> None:
    delta = SparseDelta(torch.tensor([1, 5]), torch.tensor([2.0, 3.0]), (2, 3))
    assert torch.equal(delta.dense(), torch.tensor([[0.0, 2, 0], [0, 0, 3]]))


@every_delta
def test_dense(name: str) -> None:
    delta = DELTAS[name]()
    w = dense(delta)
    assert delta.shape == tuple(w.shape)
    assert delta.dense().dtype == torch.float32
    torch.testing.assert_close(delta.dense().double(), w, rtol=1e-5, atol=1e-6)


@every_delta
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,)])
def test_apply_is_the_product_with_each_row(name: str, batch: tuple[int, ...]) -> None:
    delta = DELTAS[name]()
    x = torch.randn(*batch, delta.shape[1], generator=torch.Generator().manual_seed(0))
    y = delta.apply(x)
    torch.testing.assert_close(y.double(), x.double() @ dense(delta).T, rtol=1e-4, atol=1e-5)
    assert y.dtype == x.dtype


@every_delta
def test_apply_keeps_the_dtype_and_its_precision(name: str) -> None:
    delta = DELTAS[name]()
    x = torch.randn(3, delta.shape[1], generator=torch.Generator().manual_seed(0))
    exact = delta.apply(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, x.double() @ dense(delta).T, rtol=1e-12, atol=1e-12)
    half = delta.apply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact.float(), rtol=0.05, atol=0.1)


@every_delta
def test_norm(name: str) -> None:
    delta = DELTAS[name]()
    assert delta.norm() == pytest.approx(dense(delta).norm().item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("first", DELTAS, ids=lambda name: name.replace(" ", "-"))
def test_inner_is_the_sum_of_products_for_every_pair(first: str) -> None:
    a = DELTAS[first]()
    for second in DELTAS:
        b = DELTAS[second]()
        if a.shape != b.shape:
            with pytest.raises(UsageError, match="one shape"):
                a.inner(b)
            continue
        wanted = (dense(a) * dense(b)).sum().item()
        assert a.inner(b) == pytest.approx(wanted, rel=1e-9, abs=1e-9), second
        assert b.inner(a) == pytest.approx(wanted, rel=1e-9, abs=1e-9), second


@every_delta
def test_top_direction_is_the_top_right_singular_vector(name: str) -> None:
    delta = DELTAS[name]()
    v, w = delta.top_direction(), dense(delta)
    assert v.dtype == torch.float32
    assert v.shape == (delta.shape[1],)
    if not w.any():
        assert not v.any()
        return
    _, values, vh = torch.linalg.svd(w)
    assert v.norm().item() == pytest.approx(1, abs=1e-6)
    assert (w @ v.double()).norm().item() == pytest.approx(values[0].item(), rel=1e-6)
    if len(values) == 1 or values[0] > 1.001 * values[1]:
        assert abs(v.double() @ vh[0]).item() == pytest.approx(1, abs=1e-6)
    assert v[v.abs().argmax()] > 0
    assert torch.equal(v, DELTAS[name]().top_direction())  # the same every time


@pytest.mark.parametrize(
    "delta",
    [
        LoRADelta(torch.eye(4, 9), torch.eye(6, 4), 3.0),
        LoRADelta(torch.eye(9), torch.eye(9), 1.0),
        SparseDelta(torch.arange(6) * 10, torch.ones(6), (6, 9)),
        SparseDelta(torch.arange(40) * 41, torch.full((40,), -2.0), (40, 40)),
        SparseDelta(torch.arange(50) * 51, torch.ones(50), (50, 50)),
        SparseDelta(torch.tensor([0]), torch.tensor([1e-20]), (50, 50)),
        SparseDelta(torch.arange(40) * 41, torch.linspace(1, 1.0001, 40), (40, 40)),
        SparseDelta(torch.tensor([0, 4]), torch.eye(16).repeat(2, 1, 1), (48, 48), 16),
    ],
    ids=[
        "lora",
        "identity",
        "small-sparse",
        "negative",
        "large-sparse",
        "tiny-value",
        "nearly-flat",
        "blocks",
    ],
)
def test_a_flat_spectrum_still_gives_a_direction_that_is_stretched_most(delta: Delta) -> None:
    v = delta.top_direction().double()
    top = torch.linalg.matrix_norm(dense(delta), 2).item()
    assert v.norm().item() == pytest.approx(1, abs=1e-6)
    assert (dense(delta) @ v).norm().item() == pytest.approx(top, rel=1e-5)


def test_the_same_update_by_other_factors_is_the_same() -> None:
    delta = lora(7, rank=3, d_out=20, d_in=30)
    r = torch.tensor([[2.0, 1, 0], [0, 1, 3], [1, 0, 1]])
    other = LoRADelta(r @ delta.a, delta.b @ torch.linalg.inv(r), delta.scale)
    moved = LoRADelta(delta.a * 4, delta.b, delta.scale / 4)
    for same in (other, moved):
        torch.testing.assert_close(same.top_direction(), delta.top_direction(), rtol=0, atol=1e-5)
        torch.testing.assert_close(same.sketch(), delta.sketch(), rtol=1e-4, atol=1e-4)
        assert same.norm() == pytest.approx(delta.norm(), rel=1e-5)
        assert same.inner(delta) == pytest.approx(delta.norm() ** 2, rel=1e-5)


@every_delta
def test_the_same_matrix_has_one_sketch_whatever_its_kind(name: str) -> None:
    delta = DELTAS[name]()
    w = delta.dense()
    full = SparseDelta(torch.arange(w.numel()), w.reshape(-1), delta.shape)
    factors = LoRADelta(w, torch.eye(w.shape[0]), 1.0)
    for seed in (0, 3):
        wanted = delta.sketch(seed=seed, size=8)
        assert wanted.shape == (8, 8)
        for same in (full, factors):
            torch.testing.assert_close(same.sketch(seed=seed, size=8), wanted, rtol=1e-4, atol=1e-4)
    assert w.any() == any((delta.sketch(seed=s) != delta.sketch()).any() for s in range(1, 9))


def test_the_inner_product_of_sketches_has_the_mean_of_the_inner_product() -> None:
    a, b = lora(1, rank=4, d_out=24, d_in=40), lora(2, rank=2, d_out=24, d_in=40)
    both = LoRADelta(torch.cat([a.a, b.a]), torch.cat([a.b, b.b], 1), 1.0)  # shares much with each
    draws = [(a.sketch(seed=s) * both.sketch(seed=s)).sum().item() for s in range(300)]
    mean = sum(draws) / len(draws)
    spread = (sum((x - mean) ** 2 for x in draws) / len(draws)) ** 0.5
    assert abs(mean - a.inner(both)) < 4 * spread / len(draws) ** 0.5


def test_the_projection_is_pinned() -> None:
    """Kept sketches stay comparable only while these numbers stay."""
    delta = LoRADelta(torch.arange(1.0, 6)[None], torch.arange(1.0, 5)[:, None])
    for seed, wanted in GOLDEN_SKETCHES.items():
        assert (delta.sketch(seed=seed, size=2) - torch.tensor(wanted)).abs().max() < 1e-5


GOLDEN_SKETCHES = {
    3: [[19.0, 27.0], [-26.0, -20.0]],
    2**32 - 1: [[-1.0, 19.0], [-14.0, 38.0]],
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As outside of tests, where nothing looks at annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 5), (3, 1)), ((2,), (3, 2)), ((2, 5, 1), (3, 2)), ((0, 5), (3, 0)), ((2, 0), (3, 2))],
)
@pytest.mark.usefixtures("unchecked")
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="one rank"):
        LoRADelta(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize(
    ("index", "values", "shape", "block", "words"),
    [
        ([0, 0], (2,), (3, 5), 1, "rise strictly"),
        ([4, 2], (2,), (3, 5), 1, "rise strictly"),
        ([-1, 2], (2,), (3, 5), 1, "outside"),
        ([0, 15], (2,), (3, 5), 1, "outside 0..14"),
        ([0], (2,), (3, 5), 1, "values"),
        ([0], (1,), (16, 16), 16, "values"),
        ([0], (1, 16, 16), (16, 20), 16, "whole blocks"),
        ([0], (1, 4, 4), (16, 16), 4, "block 1 or 16"),
        ([0], (1,), (0, 5), 1, "whole blocks"),
        ([0.0], (1,), (3, 5), 1, "whole numbers"),
        ([1], (1, 16, 16), (16, 16), 16, "outside 0..0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_positions_that_do_not_fit_are_refused(
    index: list[int], values: tuple[int, ...], shape: tuple[int, int], block: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        SparseDelta(torch.tensor(index), torch.zeros(values), shape, block)


def test_an_expert_is_frozen_sorted_and_of_one_kind() -> None:
    card = {"task": "t"}
    expert = Expert("b", {"z": lora(0), "a": lora(1, rank=1)}, card)
    assert list(expert.deltas) == ["a", "z"]
    assert (expert.kind, expert.rank, expert.params) == ("lora", 2, 16 + 8)
    assert expert.shapes == {"a": (3, 5), "z": (3, 5)}
    card["task"] = "other"
    assert expert.card["task"] == "t"
    with pytest.raises(TypeError):
        expert.deltas["new"] = lora(0)  # type: ignore[index]
    with pytest.raises(UsageError, match="one kind"):
        Expert("b", {"a": lora(0), "b": sparse(0)})
    with pytest.raises(UsageError, match="without deltas"):
        Expert("b", {})
    assert Expert("b", {"a": sparse(0)}).rank is None
