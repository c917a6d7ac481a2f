"""Our merges next to PEFT's `add_weighted_adapter` on the same adapters.

Its `cat`, `svd` and `*_svd` are ours on updates. Its `linear`, `ties`, `magnitude_prune` and
`dare_*` merge the A's and the B's apart, so that (Σ B_i)(Σ A_i) has cross terms B_i A_j: that is
`on="factors"` here, and another expert than the merge of the updates.
"""

import peft
import pytest
import torch
from peft.utils import merge_utils

from adaptlib.experts import Expert, LoRADelta
from adaptlib.merging import MERGES, Part
from adaptlib.merging.draws import survivors

RANK, ALPHA = 4, 6
WEIGHTS = {
    "plain": [1.0, 1.0, 1.0],
    "unequal": [0.5, 0.2, 1.5],
    "negative": [1.0, -0.7, 0.4],
    "sum to zero": [1.0, 1.0, -2.0],
}
every_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(24, 40, bias=False)
        self.down = torch.nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


def adapters(targets=(("up", "down"),) * 3):
    """A model with random adapters e0, e1, ..., and the same as experts."""
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(t), init_lora_weights=False)
        for t in targets
    ]
    model = peft.get_peft_model(Net(), configs[0], "e0")
    for i, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{i}", config)
    experts = {}
    for i, names in enumerate(targets):
        deltas = {}
        for name in sorted(names):
            layer = getattr(model.base_model.model, name)
            for side in (layer.lora_A, layer.lora_B):
                side[f"e{i}"].weight.data.normal_()
            a, b = layer.lora_A[f"e{i}"].weight.data, layer.lora_B[f"e{i}"].weight.data
            deltas[name] = LoRADelta(a.clone(), b.clone(), ALPHA / RANK)
        experts[f"e{i}"] = Expert("net", deltas)
    return model, experts


def theirs(model, experts, weights, how, **options):
    model.add_weighted_adapter(list(experts), weights, "merged", combination_type=how, **options)
    layers = {n: getattr(model.base_model.model, n) for n in ("up", "down")}
    return {
        name: layer.get_delta_weight("merged").detach()
        for name, layer in layers.items()
        if "merged" in layer.lora_A
    }


def assert_same(expert, wanted):
    assert expert.deltas.keys() == wanted.keys()
    for module, w in wanted.items():  # by norm: a cut SVD of float32 is no better entry by entry
        assert (expert.deltas[module].dense() - w).norm() < 1e-4 * w.norm()


def apart(expert, wanted):
    """How far from each other, relative to theirs."""
    return min(
        ((expert.deltas[module].dense() - w).norm() / w.norm()).item()
        for module, w in wanted.items()
    )


FACTORS = {
    "linear": {},
    "ties": {"density": 0.3},
    "magnitude_prune": {"density": 0.3},
}


@every_weights
@pytest.mark.parametrize(("how", "options"), FACTORS.items(), ids=FACTORS)
def test_on_factors_as_peft_and_other_than_on_updates(how, options, weights):
    model, experts = adapters()
    wanted = theirs(model, experts, weights, how, **options)
    got = MERGES[how](experts, weights=weights, on="factors", **options)
    assert_same(got, wanted)
    assert all(delta.rank == RANK for delta in got.deltas.values())
    updates = MERGES[how](experts, weights=weights, **options)
    assert apart(updates, wanted) > 0.3


def test_the_difference_of_linear_is_the_cross_terms():
    model, experts = adapters()
    wanted = theirs(model, experts, [0.2, 0.3, 0.5], "linear")
    roots = torch.tensor([0.2, 0.3, 0.5]).mul(ALPHA / RANK).sqrt()
    got = MERGES["linear"](experts, weights=[0.2, 0.3, 0.5])
    for module, w in wanted.items():
        of = [expert.deltas[module] for expert in experts.values()]
        cross = sum(
            roots[i] * roots[j] * of[i].b @ of[j].a for i in range(3) for j in range(3) if i != j
        )
        torch.testing.assert_close(w - got.deltas[module].dense(), cross, rtol=1e-3, atol=2e-5)


@every_weights
def test_cat_is_the_exact_sum(weights):
    model, experts = adapters()
    wanted = theirs(model, experts, weights, "cat")
    assert_same(MERGES["cat"](experts, weights=weights), wanted)
    assert_same(MERGES["linear"](experts, weights=weights), wanted)


@every_weights
@pytest.mark.parametrize("rank", [None, 2, 7])
@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("svd", {}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.05, "elect": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
    ],
)
def test_on_updates_as_the_svd_forms(how, options, rank, weights):
    model, experts = adapters()
    named = {{"elect": "majority_sign_method"}.get(k, k): v for k, v in options.items()}
    form = how if how == "svd" else f"{how}_svd"
    wanted = theirs(model, experts, weights, form, svd_rank=rank, **named)
    got = MERGES[how](experts, weights=weights, rank=rank or RANK, **options)
    assert_same(got, wanted)


@pytest.mark.parametrize("on", ["updates", "factors"])
@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_with_our_masks_in_theirs(how, on, monkeypatch):
    """Theirs is random from torch's global state; with our masks it is the same merge."""
    model, experts = adapters()
    masks = []

    def pruned(tensor, density, rescale):
        assert rescale
        return tensor * masks.pop(0).reshape(tensor.shape) / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    for module in ("up", "down"):  # the order in which PEFT goes through the model
        deltas = tuple(expert.deltas[module] for expert in experts.values())
        for side in [""] if on == "updates" else [".A", ".B"]:
            part = Part(module + side, deltas, (1.0,) * 3, 3, (0, 1, 2))
            for i, delta in enumerate(deltas):
                shape = {"": delta.shape, ".A": delta.a.shape, ".B": delta.b.shape}[side]
                number = part.generator(0, i).initial_seed()
                mask = survivors(number, 0.4, range(shape[0] * shape[1]))
                masks.append(torch.from_numpy(mask))
    form = how if on == "factors" else f"{how}_svd"
    wanted = theirs(model, experts, [0.5, -0.2, 1.0], form, density=0.4)
    assert not masks
    rank = {} if on == "factors" else {"rank": RANK}
    got = MERGES[how](experts, weights=[0.5, -0.2, 1.0], density=0.4, on=on, **rank)
    assert_same(got, wanted)


@pytest.mark.parametrize("on", ["updates", "factors"])
@pytest.mark.parametrize("how", ["linear", "ties", "magnitude_prune"])
def test_an_adapter_that_lacks_a_module(how, on):
    """PEFT leaves it out there, which is to take it as zero."""
    model, experts = adapters((("up", "down"), ("down",), ("up", "down")))
    weights = [0.5, 1.0, -0.3]
    options = {} if how == "linear" else {"density": 0.3}
    form = how if on == "factors" else {"linear": "svd"}.get(how, f"{how}_svd")
    wanted = theirs(model, experts, weights, form, **options)
    rank = {} if on == "factors" else {"rank": RANK}
    assert_same(MERGES[how](experts, weights=weights, on=on, **rank, **options), wanted)


def test_one_adapter():
    """PEFT merges one by `linear`, whatever was asked; here a merge of one is that merge."""
    model, experts = adapters((("up", "down"),))
    wanted = theirs(model, experts, [1.0], "ties", density=0.3)
    assert_same(MERGES["linear"](experts), wanted)
    assert apart(MERGES["ties"](experts, density=0.3), wanted) > 0.1
