"""Exact inner products: those of the deltas, one by one, and of dense matrices."""

import numpy as np
import pytest
import torch

from adaptlib.clustering import cluster, gram_matrix
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta

SHAPES = {"layers.0.up": (32, 48), "layers.1.up": (32, 48), "layers.0.down": (48, 32)}


def mixed() -> dict[str, Expert]:
    """LoRA of several ranks, scales and dtypes, sparse by entry and block; some lack modules."""
    generator = torch.Generator().manual_seed(0)

    def lora(rank, scale, dtype=torch.float32):
        return {
            m: LoRADelta(
                torch.randn(rank, d_in, generator=generator).to(dtype),
                torch.randn(d_out, rank, generator=generator).to(dtype),
                scale,
            )
            for m, (d_out, d_in) in SHAPES.items()
        }

    def sparse(n, block):
        deltas = {}
        for m, (d_out, d_in) in SHAPES.items():
            places = torch.randperm(d_out * d_in // block**2, generator=generator)[:n]
            shape = (n,) if block == 1 else (n, block, block)
            values = torch.randn(shape, generator=generator)
            deltas[m] = SparseDelta(places.sort().values, values, (d_out, d_in), block)
        return deltas

    made = {"a": lora(1, 0.5), "b": lora(4, 2.0), "c": lora(3, -1.0, torch.bfloat16)}
    made |= {"d": sparse(70, 1), "e": sparse(3, 16), "f": sparse(900, 1)}
    del made["b"]["layers.1.up"], made["d"]["layers.1.up"], made["e"]["layers.0.down"]
    return {name: Expert("tiny", deltas) for name, deltas in made.items()}


def test_it_is_the_sum_of_the_inner_products_of_the_deltas():
    experts = mixed()
    found = gram_matrix(experts, experts, list(SHAPES))
    for i, one in enumerate(experts.values()):
        for j, other in enumerate(experts.values()):
            shared = one.deltas.keys() & other.deltas.keys()
            slow = sum(one.deltas[m].inner(other.deltas[m]) for m in shared)
            dense = sum(
                (one.deltas[m].dense().double() * other.deltas[m].dense().double()).sum().item()
                for m in shared
            )
            size = np.sqrt(found[i, i] * found[j, j])
            assert abs(found[i, j] - slow) < 1e-9 * size
            assert abs(found[i, j] - dense) < 1e-5 * size


def test_rows_and_columns_may_be_other_experts_and_some_modules():
    experts = mixed()
    whole = gram_matrix(experts, experts, ["layers.0.up"])
    some = {name: experts[name] for name in "ebd"}
    part = gram_matrix(some, experts, ["layers.0.up"])
    assert np.allclose(part, whole[[4, 1, 3]], rtol=1e-12)


def test_a_few_at_a_time_is_the_same(monkeypatch):
    experts = mixed()
    whole = gram_matrix(experts, experts, list(SHAPES))
    monkeypatch.setattr("adaptlib.clustering.gram.CHUNK", 1)
    assert np.allclose(gram_matrix(experts, experts, list(SHAPES)), whole, rtol=1e-12)


@pytest.mark.parametrize("method", ["agglomerative", "mbc"])
def test_families_of_any_rank_and_kind_are_found(mixed_families, method):
    experts, family = mixed_families()
    found = cluster(experts, method=method, k=3, features="gram")
    assert found.basis == "exact inner products (asked for)"
    wanted = {frozenset(n for n, i in family.items() if i == f) for f in range(3)}
    assert {frozenset(names) for names in found.clusters.values()} == wanted


def test_cosines_are_those_of_dense_updates(mixed_families):
    experts, _ = mixed_families()
    found = cluster(experts, k=3, features="gram")
    shapes = {m: s for e in experts.values() for m, s in e.shapes.items()}
    rows = []
    for name in found.names:
        held = experts[name].deltas
        parts = [
            held[m].dense().double().numpy().ravel() if m in held else np.zeros(np.prod(shape))
            for m, shape in sorted(shapes.items())
        ]
        rows.append(np.concatenate(parts))
    rows = np.stack(rows)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(found.similarity, rows @ rows.T, atol=1e-6)
