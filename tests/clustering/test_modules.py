"""Which modules a pattern means, and that the others are not looked at."""

import pytest
import torch

from adaptlib.clustering import cluster, sketch_features
from adaptlib.clustering.features import features
from adaptlib.clustering.modules import chosen
from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta

NAMES = [
    f"model.layers.{i}.{name}"
    for i in (0, 3, 13, 31)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.3.up_proj")
]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("q_proj", lambda n: n.endswith(".q_proj")),
        ("mlp", lambda n: ".mlp." in n),
        ("mlp.down_proj", lambda n: n.endswith("mlp.down_proj")),
        ("layers.3", lambda n: ".layers.3." in n),
        (3, lambda n: ".layers.3." in n),  # the layer, not the expert of that number
        ("31", lambda n: ".layers.31." in n),
        ("layers.*3", lambda n: ".layers.3." in n or ".layers.13." in n),
        ("[qk]_proj", lambda n: n[-6:] in ("q_proj", "k_proj")),
        ("model.layers.0.mlp.down_proj", lambda n: n == "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_pattern_is_parts_of_the_name(pattern, wanted):
    assert chosen(NAMES, [pattern]) == sorted(filter(wanted, NAMES))


def test_several_patterns_add_up_and_none_is_all():
    assert chosen(NAMES, ["q_proj", 0]) == sorted(
        n for n in NAMES if n.endswith("q_proj") or ".layers.0." in n
    )
    assert chosen(NAMES) == chosen(reversed(NAMES), ()) == sorted(NAMES)


@pytest.mark.parametrize("pattern", ["proj", "layers.1", 7, "q_proj.lora", ""])
def test_a_pattern_that_fits_nothing_says_what_there_is(pattern):
    with pytest.raises(UsageError, match=f"no module fits '{pattern}'") as caught:
        chosen(NAMES, ["mlp", pattern])
    assert "q_proj" in str(caught.value.hint)
    assert "layers 0 to 31" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["factors", "gram", "sketches"])
def test_only_these_are_compared(lora_families, make_expert, kind):
    """Alike in q_proj and nowhere else: found there, and not in the rest."""
    generator = torch.Generator().manual_seed(5)
    families, family = lora_families(noise=0.2)
    experts = {}
    for name, expert in families.items():
        other = make_expert(generator)
        deltas = {m: (d if "q_proj" in m else other.deltas[m]) for m, d in expert.deltas.items()}
        experts[name] = Expert("tiny", deltas)

    def groups(**options):
        found = cluster(experts, k=3, features=kind, **options)
        return {frozenset(names) for names in found.clusters.values()}

    planted = {frozenset(n for n, i in family.items() if i == f) for f in range(3)}
    assert groups(only=["q_proj"]) == planted
    assert groups(only=["down_proj"]) != planted
    found = features(experts, kind, only=[2])
    assert found.options["modules"] == ["layers.2.down_proj", "layers.2.q_proj"]
    if kind == "sketches":
        cut = {n: Expert("tiny", {m: e.deltas[m] for m in found.options["modules"]})
               for n, e in experts.items()}  # fmt: skip
        assert (found.matrix == sketch_features(cut)[0]).all()


def test_an_expert_without_the_modules_is_named():
    def expert(name):
        return Expert("tiny", {name: LoRADelta(torch.ones(1, 4), torch.ones(4, 1))})

    with pytest.raises(UsageError, match="'b' has no module that fits up"):
        features({"a": expert("up"), "b": expert("down")}, only=["up"])
