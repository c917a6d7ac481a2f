"""Tiny models, experts and batches, and what merges with data measure written out slowly: dense
loops over a model whose weights are W + ΔW, sharing nothing with adaptlib.merging."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.merging import Data

VOCAB, HIDDEN = 24, 16
Q = "model.layers.0.self_attn.q_proj"
NAMES = ("one", "two", "three")


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=1,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.5,
    )
    return GPT2LMHeadModel(config)


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            found[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return found


def make(model: Any, seed: int, *, kind: str = "lora", rank: int = 2, skip: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Any] = {}
    for name, (d_out, d_in) in list(shapes_of(model).items())[skip:]:
        if kind == "lora":
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            deltas[name] = LoRADelta(a, torch.randn(d_out, rank, generator=generator) * 0.3, 0.7)
        else:
            index = torch.randperm(d_out * d_in, generator=generator)[:20].sort().values
            values = torch.randn(20, generator=generator)
            deltas[name] = SparseDelta(index, values, (d_out, d_in))
    return Expert("tiny", deltas)


def mixed(model: Any) -> dict[str, Expert]:
    """Two ranks and both kinds; the last lacks a module."""
    return {
        "one": make(model, 1, rank=2),
        "two": make(model, 2, kind="sparse"),
        "three": make(model, 3, rank=3, skip=1),
    }


def batch(seed: int, lengths: tuple[int, ...], *, left: bool = False) -> dict[str, Tensor]:
    """Padded sequences with labels on their second halves."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    found = {key: torch.zeros(len(lengths), width, dtype=torch.long) for key in KEYS}
    found["labels"] -= 100
    for i, length in enumerate(lengths):
        here = slice(width - length, width) if left else slice(0, length)
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        found["input_ids"][i, here] = ids
        found["attention_mask"][i, here] = 1
        labels = ids.clone()
        labels[: length // 2] = -100
        found["labels"][i, here] = labels
    return found


KEYS = ("input_ids", "attention_mask", "labels")


def data_for(model: Any, names: tuple[str, ...] = NAMES) -> Data:
    """Two batches for each name, of unlike lengths, padded on either side."""
    batches = {
        name: [batch(2 * i, (7, 4)), batch(2 * i + 1, (3, 6, 5 - i), left=bool(i % 2))]
        for i, name in enumerate(names)
    }
    return Data(model, batches)


@contextmanager
def dense(model: Any, expert: Expert) -> Iterator[None]:
    """The model with W + ΔW for W."""
    named = dict(model.named_modules())
    before = {name: named[name].weight.data for name in expert.deltas}
    for name, delta in expert.deltas.items():
        update = delta.dense()
        weight = named[name].weight
        weight.data = weight.data + (update.T if isinstance(named[name], Conv1D) else update)
    yield
    for name, weight in before.items():
        named[name].weight.data = weight


def slow_inputs(model: Any, expert: Expert, batches: Any) -> dict[str, Tensor]:
    """Every token that enters each module, (tok, d_in), in double precision."""
    found: dict[str, list[Tensor]] = {name: [] for name in shapes_of(model)}
    named = dict(model.named_modules())
    for some in batches:
        mask = some["attention_mask"].bool()

        def keep(name: str, mask: Tensor = mask) -> Callable[..., None]:
            return lambda _, args: found[name].append(args[0][mask].double())

        handles = [named[name].register_forward_pre_hook(keep(name)) for name in found]
        with dense(model, expert), torch.no_grad():
            model(some["input_ids"], attention_mask=some["attention_mask"])
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def dense_of(expert: Expert, module: str, shape: tuple[int, int]) -> Tensor:
    if module not in expert.deltas:
        return torch.zeros(shape, dtype=torch.float64)
    return expert.deltas[module].dense().double()


def slow_fisher(model: Any, expert: Expert, batches: Any) -> dict[str, Tensor]:
    """The mean over sequences of the squared gradient of W + ΔW, by autograd."""
    found = {name: torch.zeros(shape) for name, shape in shapes_of(model).items()}
    named = dict(model.named_modules())
    count = 0
    for some in batches:
        for i in range(len(some["input_ids"])):
            one = {key: value[i : i + 1] for key, value in some.items()}
            labels = int((one["labels"][:, 1:] != -100).sum())
            with dense(model, expert):
                weights = [named[name].weight for name in found]
                mean = model(**one).loss
                gradients = torch.autograd.grad(mean * labels, weights)
            for (name, square), gradient in zip(found.items(), gradients, strict=True):
                turned = gradient.T if isinstance(named[name], Conv1D) else gradient
                square += turned.square()
            count += 1
    return {name: square / count for name, square in found.items()}


def slow_objective(model: Any, experts: Mapping[str, Expert], data: Data, weights: Any) -> float:
    """Mean loss of the labelled tokens at W + Σ w ΔW, and .05 of the mean size of a weight."""
    merged = {
        module: add(
            w * dense_of(experts[name], module, shape) for name, w in weights.items()
        ).float()
        for module, shape in shapes_of(model).items()
    }
    named = dict(model.named_modules())
    before = {name: named[name].weight.data for name in merged}
    for name, update in merged.items():
        weight = named[name].weight
        weight.data = weight.data + (update.T if isinstance(named[name], Conv1D) else update)
    total, count = 0.0, 0
    with torch.no_grad():
        for some in (b for batches in data.batches.values() for b in batches):
            labels = int((some["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**some).loss) * labels, count + labels
    for name, weight in before.items():
        named[name].weight.data = weight
    return total / count + 0.05 * sum(abs(w) for w in weights.values()) / len(weights)


def add(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def lora_at(expert: Expert, module: str) -> LoRADelta:
    delta = expert.deltas[module]
    assert isinstance(delta, LoRADelta)
    return delta


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()
