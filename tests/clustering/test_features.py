"""What experts are compared by: factors where they line up, sketches for any."""

import math

import numpy as np
import pytest
import torch

from adaptlib.clustering import factor_features, sketch_features
from adaptlib.clustering.features import features
from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta


def inner(one, other):
    return sum(
        (one.deltas[name].dense() * other.deltas[name].dense()).sum().item()
        for name in one.deltas
        if name in other.deltas
    )


def refactored(expert, generator):
    """The same expert in other factors: A -> R A, B -> B R⁻¹."""
    deltas = {}
    for name, delta in expert.deltas.items():
        r = torch.randn(delta.rank, delta.rank, generator=generator)
        r = r + 3 * torch.eye(delta.rank)
        deltas[name] = LoRADelta(r @ delta.a, delta.b @ torch.linalg.inv(r), delta.scale)
    return Expert(expert.base, deltas)


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_factors_are_a_then_b_of_sorted_modules():
    def delta(start):
        numbers = torch.arange(start, start + 10.0)
        return LoRADelta(numbers[:4].reshape(2, 2), numbers[4:].reshape(3, 2), 7.0)

    expert = Expert("tiny", {"z": delta(100), "a": delta(0)})
    matrix, names = factor_features({"y": expert, "x": expert})
    assert names == ["x", "y"]
    assert matrix.dtype == np.float32
    assert matrix.tolist() == [[*range(10), *range(100, 110)]] * 2  # the scale is not in it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_grad_will_do(dtype):
    a = torch.ones(1, 4, dtype=dtype, requires_grad=True)
    b = torch.ones(4, 1, dtype=dtype, requires_grad=True)
    experts = {"x": Expert("tiny", {"m": LoRADelta(a, b)})}
    assert factor_features(experts)[0].tolist() == [[1.0] * 8]
    assert sketch_features(experts)[0].shape == (1, 256)


def test_auto_takes_factors_where_they_line_up(lora_families):
    experts, _ = lora_families()
    chosen = features(experts)
    assert (chosen.kind, str(chosen)) == ("factors", "LoRA factors (same modules and ranks)")
    assert features(experts, "sketches").why == "asked for"


def test_auto_says_why_it_takes_sketches(make_expert, sparse_families):
    generator = torch.Generator().manual_seed(0)
    rank4, rank2 = make_expert(generator), make_expert(generator, rank=2)
    fewer = Expert("tiny", dict(list(rank4.deltas.items())[1:]))
    sparse = next(iter(sparse_families()[0].values()))
    for experts, why in [
        ([rank4, rank2], "ranks differ"),
        ([rank4, fewer], "modules differ"),
        ([rank4, sparse], "LoRA and sparse experts"),
        ([sparse, sparse], "experts are sparse"),
    ]:
        chosen = features({str(i): expert for i, expert in enumerate(experts)})
        assert str(chosen) == f"delta sketches ({why})"
        with pytest.raises(UsageError, match=why) as caught:
            features({str(i): expert for i, expert in enumerate(experts)}, "factors")
        assert "sketches" in str(caught.value.hint)


def test_a_lacking_module_is_zeros(make_expert):
    whole = make_expert(torch.Generator().manual_seed(0))
    lacking = sorted(whole.deltas)[3]
    part = Expert("tiny", {n: d for n, d in whole.deltas.items() if n != lacking})
    matrix, _ = sketch_features({"part": part, "whole": whole}, size=4)
    blocks = matrix.reshape(2, len(whole.deltas), 16)
    assert not blocks[0, 3].any()
    assert blocks[1, 3].any()
    assert np.array_equal(np.delete(blocks[0], 3, axis=0), np.delete(blocks[1], 3, axis=0))


def test_sketch_inner_products_have_the_right_mean(make_expert, sparse_families):
    """Over 120 seeds the mean is within 4 standard errors of the sum of entry products, and the
    spread is that of a two-sided projection, not more."""
    generator = torch.Generator().manual_seed(1)
    centre = make_expert(generator)
    experts = {
        "a": make_expert(generator, centre=centre),
        "b": make_expert(generator, centre=centre),
        "c": make_expert(generator, rank=2),
        "d": next(iter(sparse_families()[0].values())),
    }
    seeds = 120
    grams = np.array(
        [(m := sketch_features(experts, seed=s, size=8)[0].astype(float)) @ m.T
         for s in range(seeds)]
    )  # fmt: skip
    names = list(experts)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            wanted = inner(experts[one], experts[other])
            error = grams[:, i, j].std(ddof=1) / math.sqrt(seeds)
            assert abs(grams[:, i, j].mean() - wanted) < 4 * error
            norms = inner(experts[one], experts[one]) * inner(experts[other], experts[other])
            assert grams[:, i, j].std() < 0.5 * math.sqrt(norms)


def test_modules_have_errors_of_their_own():
    """The same ΔW in each of 64 modules: with one seed for all, errors would not average out."""
    generator = torch.Generator().manual_seed(0)
    delta = LoRADelta(
        torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    )
    true = delta.inner(delta)

    def errors(modules):
        expert = Expert("tiny", {f"m{i}": delta for i in range(modules)})
        rows = [sketch_features({"x": expert}, seed=s, size=4)[0][0] for s in range(60)]
        return np.array([row @ row / (modules * true) - 1 for row in rows])

    assert errors(64).std() < errors(1).std() / 4  # 1/8 is expected


def test_sketches_do_not_see_how_a_lora_is_factored_and_factors_do(make_expert):
    generator = torch.Generator().manual_seed(3)
    expert = make_expert(generator)
    experts = {"other": refactored(expert, generator), "same": expert}
    assert torch.allclose(
        experts["other"].deltas["layers.0.q_proj"].dense(),
        expert.deltas["layers.0.q_proj"].dense(),
        atol=1e-4,
    )
    assert cosine(*sketch_features(experts)[0]) > 1 - 1e-6
    assert cosine(*factor_features(experts)[0]) < 0.9


def test_sketches_of_a_delta_do_not_depend_on_its_kind(make_expert):
    lora = make_expert(torch.Generator().manual_seed(0))
    sparse = Expert(
        "tiny",
        {
            name: SparseDelta(
                torch.arange(delta.dense().numel()), delta.dense().reshape(-1), delta.shape
            )
            for name, delta in lora.deltas.items()
        },
    )
    matrix, _ = sketch_features({"lora": lora, "sparse": sparse})
    assert np.allclose(matrix[0], matrix[1], atol=1e-4)


def test_no_experts():
    for make in (features, factor_features, sketch_features):
        with pytest.raises(UsageError, match="no experts"):
            make({})


def test_experts_of_two_base_models(make_expert):
    generator = torch.Generator().manual_seed(0)
    experts = {"x": make_expert(generator), "y": make_expert(generator, base="other")}
    with pytest.raises(BaseMismatchError, match=r"'tiny' \('x'\), 'other' \('y'\)"):
        features(experts)


def test_one_base_name_and_two_shapes():
    def expert(width):
        return Expert("tiny", {"m": LoRADelta(torch.ones(1, width), torch.ones(4, 1))})

    with pytest.raises(BaseMismatchError, match=r"'x' and 'y'.*'m': \(4, 8\) and \(4, 16\)"):
        features({"x": expert(8), "y": expert(16)})


@pytest.mark.parametrize("kind", ["factors", "gram", "sketches"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused_by_name(make_expert, kind, bad):
    generator = torch.Generator().manual_seed(0)
    experts = {"good": make_expert(generator), "ill": make_expert(generator)}
    experts["ill"].deltas["layers.2.q_proj"].b[3, 1] = bad
    with pytest.raises(RefusedError, match=r"'ill' holds NaN or infinity in 'layers.2.q_proj'"):
        features(experts, kind)


def test_bad_options(make_expert):
    experts = {"x": make_expert(torch.Generator().manual_seed(0))}
    with pytest.raises(UsageError, match="auto, factors, gram or sketches; got 'weights'"):
        features(experts, "weights")
    with pytest.raises(UsageError, match="got 0"):
        sketch_features(experts, size=0)
