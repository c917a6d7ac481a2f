"""Modules that see the same input run together, to the same numbers, and only if they do see it."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from adaptlib import Expert, LoRADelta
from adaptlib.routing import Arrow, Uniform, attach
from adaptlib.routing.bank import Bank
from adaptlib.routing.router import Choice
from adaptlib.routing.together import join


def banks_of(ranks, widths, mix="outputs", dtype=torch.float32, d_in=32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    return {
        name: Bank.of(
            name,
            {i: LoRADelta(draw(r, d_in), draw(width, r), 0.5) for i, r in enumerate(ranks)},
            experts=len(ranks),
            mix=mix,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        for name, width in widths.items()
    }


def choice_of(tok, modules, experts, k):
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tok, modules, experts, generator=generator).topk(k).indices
    return Choice(index, torch.rand(tok, modules, k, generator=generator).softmax(-1))


@pytest.mark.parametrize("tok", [0, 1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "widths", "mix"),
    [
        ([4] * 12, {"q": 32, "k": 32, "v": 32}, "outputs"),
        ([4] * 12, {"q": 32, "k": 16, "v": 16}, "outputs"),
        ([2, 7, 3] * 6, {"q": 32, "k": 16}, "outputs"),
        ([2, 7, 3] * 6, {"q": 32, "k": 32}, "outputs"),
        ([4] * 12, {"q": 32, "k": 32}, "factors"),
        ([4] * 12, {"q": 32, "k": 16}, "factors"),
        ([4, 4], {"q": 32, "k": 16}, "factors"),
    ],
)
def test_together_they_are_what_each_is_alone(tok, dtype, ranks, widths, mix):
    banks = banks_of(ranks, widths, mix, dtype)
    joined, parts = join(banks, list(widths))
    choice = choice_of(tok, len(widths), len(ranks), 2)
    x = torch.randn(tok, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for m, (name, got) in enumerate(zip(widths, joined(x, choice), strict=True)):
        mine = Choice(choice.index[:, m], choice.weight[:, m])
        assert got.shape == (tok, widths[name])
        torch.testing.assert_close(got, banks[name](x, mine), **close)
        torch.testing.assert_close(parts[name](x, mine), banks[name](x, mine), **close)


def test_nothing_is_there_twice():
    banks = banks_of([4] * 6, {"q": 32, "k": 32})
    joined, parts = join(banks, ["q", "k"])
    for m, part in enumerate(parts.values()):
        assert part.lora is not None
        assert part.lora is not banks[joined.modules[m]].lora
        assert part.lora.a.untyped_storage().data_ptr() == joined.a.untyped_storage().data_ptr()
        assert joined.b is not None
        assert part.lora.b.untyped_storage().data_ptr() == joined.b.untyped_storage().data_ptr()


class Odd(nn.Module):
    """Names that promise one input for q, k and v, which is not so; and k runs before q."""

    def __init__(self, d=32):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        self.config = PretrainedConfig()

    def forward(self, x):
        k = self.k_proj(x * 2)
        q = self.q_proj(x)
        return q + k + self.v_proj(x + 1)


@torch.no_grad()
def test_names_that_promise_one_input_are_not_trusted():
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 32)
    experts = {
        name: Expert(
            "odd",
            {
                m: LoRADelta(torch.randn(3, 32), torch.randn(32, 3))
                for m in ("q_proj", "k_proj", "v_proj")
            },
        )
        for name in "abcdef"
    }
    for router in (Arrow.fit(experts, top_k=2), Uniform.fit(experts)):
        wanted = model(x)
        for module, seen in (("k_proj", x * 2), ("q_proj", x), ("v_proj", x + 1)):
            index, weight = router.route(module, seen)
            values = list(experts.values())
            for t in range(5):
                for i, w in zip(index[t].tolist(), weight[t], strict=True):
                    wanted[t] += w * values[i].deltas[module].apply(seen[t])
        with attach(model, experts, router):
            for _ in range(2):
                torch.testing.assert_close(model(x), wanted, atol=1e-3, rtol=1e-5)
