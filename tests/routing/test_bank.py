"""The fused forward: each of its paths against loops over tokens and experts."""

import pytest
import torch

from adaptlib import LoRADelta, SparseDelta
from adaptlib.errors import UsageError
from adaptlib.routing.bank import Bank, LoRAStack
from adaptlib.routing.gathered import can_gather
from adaptlib.routing.router import Choice

D_IN, D_OUT, EXPERTS = 32, 48, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def make_loras(generator, ranks, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    return {i: LoRADelta(draw(r, D_IN), draw(D_OUT, r), 0.5 + i) for i, r in ranks.items()}


def make_sparse(generator, block):
    size = D_IN * D_OUT // block**2
    n = max(2, size // 5)
    index = torch.randperm(size, generator=generator)[:n].sort().values
    values = torch.randn((n,) if block == 1 else (n, block, block), generator=generator)
    return SparseDelta(index, values, (D_OUT, D_IN), block)


def make_choice(generator, tok, columns, k, dtype=torch.float32):
    picks = [torch.randperm(len(columns), generator=generator)[:k] for _ in range(tok)]
    index = torch.tensor(columns)[torch.stack(picks)]
    weight = torch.rand(tok, k, generator=generator, dtype=dtype).softmax(-1)
    return Choice(index, weight)


def loops(deltas, x, choice, mix):
    rows = []
    for token, indices, weights in zip(x.double(), choice.index, choice.weight, strict=True):
        chosen = [(w, deltas[i]) for w, i in zip(weights, indices.tolist(), strict=True)]
        if mix == "outputs":
            rows.append(sum(w * (dense_double(d) @ token) for w, d in chosen))
        else:
            a = sum(w * d.a.double() for w, d in chosen)
            b = sum(w * d.scale * d.b.double() for w, d in chosen)
            rows.append(b @ (a @ token))
    return torch.stack(rows)


def dense_double(delta):
    if isinstance(delta, LoRADelta):
        return delta.scale * delta.b.double() @ delta.a.double()
    return delta.dense().double()


def bank_of(deltas, mix, dtype=torch.float32):
    return Bank.of("q", deltas, experts=EXPERTS, mix=mix, dtype=dtype, device=torch.device("cpu"))


def paths(stack):
    """Every way to the same numbers that this stack can take."""
    ways = [stack.dense, stack.gather, stack.mix]
    ways += [stack.in_place] if can_gather(stack.a) else []
    ways += [stack.grouped] if stack.even and stack._aligned() else []
    return ways


@pytest.mark.parametrize("tok", [1, 2, 17])
@pytest.mark.parametrize(
    ("mix", "ranks"),
    [
        ("outputs", {0: 4, 1: 4, 2: 4, 4: 4}),
        ("outputs", {0: 1, 2: 7, 3: 3, 5: 12}),
        ("factors", {0: 4, 1: 4, 2: 4, 4: 4}),
        ("factors", {1: 1, 2: 1, 5: 1}),
    ],
)
def test_every_lora_path_is_the_sum_over_the_chosen(generator, tok, mix, ranks):
    deltas = make_loras(generator, ranks)
    choice = make_choice(generator, tok, list(ranks), 2)
    x = torch.randn(tok, D_IN, generator=generator)
    wanted = loops(deltas, x, choice, mix).float()
    bank = bank_of(deltas, mix)
    assert bank.lora is not None
    for path in paths(bank.lora):
        torch.testing.assert_close(path(x, choice, mix), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(bank(x, choice), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tok", [1, 17])
def test_lora_and_sparse_together(generator, tok):
    deltas = {
        **make_loras(generator, {0: 3, 3: 5}),
        1: make_sparse(generator, 1),
        4: make_sparse(generator, 16),
    }
    choice = make_choice(generator, tok, [0, 1, 3, 4], 3)
    x = torch.randn(tok, D_IN, generator=generator)
    wanted = loops(deltas, x, choice, "outputs").float()
    bank = bank_of(deltas, "outputs")
    torch.testing.assert_close(bank(x, choice), wanted, atol=1e-5, rtol=1e-5)
    assert bank.lora is not None
    for path in paths(bank.lora):
        got = path(x, choice, "outputs") + bank._sparse(x, choice)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix", ["outputs", "factors"])
@pytest.mark.parametrize("tok", [1, 6])
def test_a_choice_for_a_whole_sequence_is_that_choice_for_each_of_its_tokens(generator, tok, mix):
    deltas = make_loras(generator, dict.fromkeys((0, 1, 3), 4))
    if mix == "outputs":
        deltas |= {2: make_sparse(generator, 1)} | make_loras(generator, {5: 7})
    choice = make_choice(generator, 3, list(deltas), 2)
    x = torch.randn(3, tok, D_IN, generator=generator)
    every = Choice(*(part.repeat_interleave(tok, 0) for part in choice))
    bank = bank_of(deltas, mix)
    wanted = loops(deltas, x.flatten(0, 1), every, mix).float().unflatten(0, (3, tok))
    torch.testing.assert_close(bank.shared(x, choice), wanted, atol=2e-5, rtol=1e-5)


def test_an_expert_without_the_module_adds_nothing_on_any_path(generator):
    """A choice for a whole prompt names the same experts at every module."""
    deltas = make_loras(generator, {1: 4, 3: 4})
    x = torch.randn(5, D_IN, generator=generator)
    choice = Choice(torch.tensor([[0, 3]]).expand(5, 2), torch.tensor([[0.25, 0.75]]).expand(5, 2))
    wanted = 0.75 * deltas[3].apply(x)
    stack = bank_of(deltas, "outputs").lora
    assert stack is not None
    for path in paths(stack):
        torch.testing.assert_close(path(x, choice, "outputs"), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("tok", "experts", "dtype", "path"),
    [
        (1, 64, torch.float32, "rows"),
        (2048, 64, torch.float32, "rows"),
        (16, 4, torch.float32, "dense"),
        (1, 64, torch.bfloat16, "gather"),
        (16, 4, torch.bfloat16, "dense"),
        (2048, 64, torch.bfloat16, "grouped"),
    ],
)
def test_which_path_is_taken(generator, tok, experts, dtype, path):
    deltas = make_loras(generator, dict.fromkeys(range(experts), 8))
    stack = LoRAStack.of(deltas, experts=experts, dtype=dtype, device=torch.device("cpu"))
    assert stack.path(tok, 2) == path


def test_no_tokens(generator):
    deltas = {**make_loras(generator, {0: 3}), 1: make_sparse(generator, 1)}
    choice = Choice(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert bank_of(deltas, "outputs")(torch.zeros(0, D_IN), choice).shape == (0, D_OUT)


@pytest.mark.parametrize("mix", ["outputs", "factors"])
@pytest.mark.parametrize("path", ["dense", "gather", "in_place"])
def test_gradients_by_finite_differences(generator, mix, path):
    deltas = make_loras(generator, {0: 2, 1: 2, 3: 2}, torch.float64)
    stack = bank_of(deltas, mix, torch.float64).lora
    index, weight = make_choice(generator, 3, [0, 1, 3], 2, torch.float64)
    x = torch.randn(3, D_IN, generator=generator, dtype=torch.float64)

    def run(x, weight):
        return getattr(stack, path)(x, Choice(index, weight), mix)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("mix", ["outputs", "factors"])
def test_gradients_of_the_grouped_path_are_those_of_the_dense(generator, mix):
    stack = bank_of(make_loras(generator, dict.fromkeys((0, 1, 3), 4)), mix).lora
    assert stack is not None
    index, weight = make_choice(generator, 9, [0, 1, 3], 2)
    x = torch.randn(9, D_IN, generator=generator).requires_grad_()
    weight.requires_grad_()
    seed = torch.randn(9, D_OUT, generator=generator)
    got, wanted = (
        torch.autograd.grad((path(x, Choice(index, weight), mix) * seed).sum(), (x, weight))
        for path in (stack.grouped, stack.dense)
    )
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_of_sparse_and_lora_together_are_those_of_the_loops(generator):
    deltas = {**make_loras(generator, {0: 3}), 1: make_sparse(generator, 1)}
    deltas[4] = make_sparse(generator, 16)
    index, weight = make_choice(generator, 5, [0, 1, 4], 2)
    x = torch.randn(5, D_IN, generator=generator).requires_grad_()
    weight.requires_grad_()
    choice = Choice(index, weight)
    seed = torch.randn(5, D_OUT, generator=generator)
    got = torch.autograd.grad((bank_of(deltas, "outputs")(x, choice) * seed).sum(), (x, weight))
    wanted = torch.autograd.grad((loops(deltas, x, choice, "outputs") * seed).sum(), (x, weight))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix", ["outputs", "factors"])
@pytest.mark.parametrize("ranks", [{0: 3, 2: 5}, {0: 8, 2: 8}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_on_the_paths_of_a_gpu(generator, dtype, ranks, mix):
    if mix == "factors" and len(set(ranks.values())) > 1:
        ranks = dict.fromkeys(ranks, 3)
    deltas = make_loras(generator, ranks)
    choice = make_choice(generator, 9, [0, 2], 2)
    x = torch.randn(9, D_IN, generator=generator).to(dtype)
    wanted = loops(deltas, x, choice, mix)
    stack = LoRAStack.of(deltas, experts=EXPERTS, dtype=dtype, device=torch.device("cpu"))
    assert stack.a.dtype == stack.b.dtype == dtype
    for path in paths(stack):
        got = path(x, choice, mix).double()
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_is_that_of_the_input_alone(generator, dtype):
    deltas = {**make_loras(generator, {0: 3, 2: 5}), 1: make_sparse(generator, 1)}
    choice = make_choice(generator, 9, [0, 1, 2], 2)
    x = torch.randn(9, D_IN, generator=generator).to(dtype)
    got = bank_of(deltas, "outputs", dtype)(x, choice)
    torch.testing.assert_close(
        got, loops(deltas, x, choice, "outputs").float(), atol=1e-5, rtol=1e-5
    )


def test_factors_want_lora_of_one_rank(generator):
    with pytest.raises(UsageError, match="one rank at each module; q has ranks 2, 3"):
        bank_of(make_loras(generator, {0: 2, 1: 3}), "factors")
    with pytest.raises(UsageError, match="q has no LoRA and 1 sparse"):
        bank_of({0: make_sparse(generator, 1)}, "factors")


def test_experts_are_not_touched_and_not_trained(generator):
    deltas = make_loras(generator, {0: 2, 1: 2})
    deltas[0].a.requires_grad_()
    before = deltas[0].a.detach().clone()
    bank = bank_of(deltas, "outputs")
    out = bank(torch.ones(1, D_IN), Choice(torch.tensor([[0]]), torch.ones(1, 1)))
    assert not out.requires_grad
    assert torch.equal(deltas[0].a.detach(), before)
