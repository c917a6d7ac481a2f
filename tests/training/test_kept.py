"""The gradient of kept entries is the dense gradient, looked up; the module is put back."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlib.training import kept
from adaptlib.training.kept import Kept, blocks, entries, pattern


def some(count: int, of: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(of, generator=generator)[:count].sort().values


@pytest.mark.parametrize("chunk", [1 << 24, 100, 1])
@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("count", [1, 37, 48 * 32])
def test_entries_are_those_of_the_dense_product(monkeypatch, chunk, mkl, count) -> None:
    monkeypatch.setattr(kept, "CHUNK", chunk)
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", bool)
    g, x = torch.randn(7, 48), torch.randn(7, 32)
    index = some(count, 48 * 32)
    where = pattern(index, (48, 32))
    assert (where is not None) == (mkl and torch.backends.mkl.is_available())
    torch.testing.assert_close(entries(g, x, index, where), (g.T @ x).flatten()[index])


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_blocks_are_those_of_the_dense_product(monkeypatch, chunk, count) -> None:
    monkeypatch.setattr(kept, "CHUNK", chunk)
    g, x = torch.randn(7, 48), torch.randn(7, 32)
    index = some(count, 6)
    dense = g.T @ x
    for block, place in zip(blocks(g, x, index), index.tolist(), strict=True):
        row, column = place // 2 * 16, place % 2 * 16
        torch.testing.assert_close(block, dense[row : row + 16, column : column + 16])


def modules() -> list[nn.Module]:
    conv = Conv1D(48, 32)
    conv.bias.data.normal_()
    return [nn.Linear(32, 48), nn.Linear(32, 48, bias=False), conv]


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("module", modules(), ids=["linear", "no-bias", "conv1d"])
def test_forward_backward_and_restore(module, block) -> None:
    module.requires_grad_(False)
    before = module.weight.clone()
    kept_ = Kept(module, some(3, 48 * 32 // block**2, seed=1), block)
    shape = (3,) if block == 1 else (3, 16, 16)
    kept_.values = torch.randn(shape).requires_grad_()
    kept_.write()
    dense = torch.zeros(48, 32)
    for place, value in zip(kept_.index.tolist(), kept_.values.detach(), strict=True):
        row, column = place // (32 // block) * block, place % (32 // block) * block
        dense[row : row + block, column : column + block] = value

    x = torch.randn(2, 5, 32, requires_grad=True)
    weight = (before.T if isinstance(module, Conv1D) else before) + dense
    weight.requires_grad_()
    wanted = nn.functional.linear(x, weight, module.bias)
    got = kept_(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(kept_.pick(dense), kept_.values.detach())

    up = torch.randn_like(wanted)
    wanted_x, wanted_weight = torch.autograd.grad(wanted, (x, weight), up)
    got_x, got_values = torch.autograd.grad(got, (x, kept_.values), up)
    torch.testing.assert_close(got_x, wanted_x)
    torch.testing.assert_close(got_values, kept_.pick(wanted_weight))

    kept_.restore()
    assert torch.equal(module.weight, before)


def test_half_precision_rounds_the_sum_once() -> None:
    module = nn.Linear(32, 48).to(torch.bfloat16).requires_grad_(False)
    before = module.weight.clone()
    kept_ = Kept(module, torch.tensor([0, 5]), 1)
    kept_.values = torch.tensor([1.0, 1e-6]).requires_grad_()
    for _ in range(3):
        kept_.write()  # writing again adds nothing
    assert module.weight[0, 0] == (before[0, 0].float() + 1.0).bfloat16()
    assert module.weight[0, 5] == before[0, 5]
    got = kept_(torch.randn(4, 32, dtype=torch.bfloat16))
    (gradient,) = torch.autograd.grad(got.float().sum(), kept_.values)
    assert gradient.dtype == torch.float32
    kept_.restore()
    assert torch.equal(module.weight, before)
