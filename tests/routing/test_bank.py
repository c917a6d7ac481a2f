"""The fused forward: each of its paths against loops over tokens and experts."""

import pytest
import torch

from adaptlib import LoRADelta, SparseDelta
from adaptlib.errors import UsageError
from adaptlib.routing.bank import Bank, LoRAStack
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
    for path in (bank.lora.dense, bank.lora.gather, bank.lora.grouped, bank.lora.mix):
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
    for path in (bank.lora.dense, bank.lora.gather, bank.lora.grouped):
        got = path(x, choice, "outputs") + bank._sparse(x, choice)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tok", "experts", "path"), [(1, 64, "gather"), (16, 4, "dense"), (2048, 64, "grouped")]
)
def test_which_path_is_taken(generator, monkeypatch, tok, experts, path):
    deltas = make_loras(generator, dict.fromkeys(range(experts), 8))
    bank = Bank.of(
        "q",
        deltas,
        experts=experts,
        mix="outputs",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    taken = []
    for name in ("dense", "gather", "grouped"):
        monkeypatch.setattr(LoRAStack, name, lambda self, x, *_, name=name: taken.append(name) or x)
    bank(torch.zeros(tok, D_IN), make_choice(generator, tok, list(range(experts)), 2))
    assert taken == [path]


def test_no_tokens(generator):
    deltas = {**make_loras(generator, {0: 3}), 1: make_sparse(generator, 1)}
    choice = Choice(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert bank_of(deltas, "outputs")(torch.zeros(0, D_IN), choice).shape == (0, D_OUT)


@pytest.mark.parametrize("mix", ["outputs", "factors"])
@pytest.mark.parametrize("path", ["dense", "gather", "grouped"])
def test_gradients_by_finite_differences(generator, mix, path):
    deltas = make_loras(generator, {0: 2, 1: 2, 3: 2}, torch.float64)
    stack = bank_of(deltas, mix, torch.float64).lora
    index, weight = make_choice(generator, 3, [0, 1, 3], 2, torch.float64)
    x = torch.randn(3, D_IN, generator=generator, dtype=torch.float64)

    def run(x, weight):
        return getattr(stack, path)(x, Choice(index, weight), mix)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_on_every_path(generator, dtype):
    deltas = {**make_loras(generator, {0: 3, 2: 5}), 1: make_sparse(generator, 1)}
    choice = make_choice(generator, 9, [0, 1, 2], 2)
    x = torch.randn(9, D_IN, generator=generator).to(dtype)
    wanted = loops(deltas, x, choice, "outputs")
    bank = bank_of(deltas, "outputs", dtype)
    assert bank.lora is not None
    assert bank.lora.a.dtype == bank.lora.b.dtype == dtype
    for lora in (bank.lora.dense, bank.lora.gather, bank.lora.grouped):
        got = lora(x, choice, "outputs").double() + bank._sparse(x, choice)
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


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
