"""A shortlist against full Arrow over all experts, by loops over tokens, modules and experts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, NotFoundError, UsageError
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts import prototypes as index
from adaptlib.experts.prototypes import Catalogue, catalogue
from adaptlib.experts.shelf import Shelf
from adaptlib.routing import Arrow, attach
from adaptlib.routing import shortlist as module
from adaptlib.routing.shortlist import arrow, estimate, fitting, look, shortlist, weigh
from library_store import MemoryStore
from tests.tiny import same_tensor

TASKS, EACH, VOCAB = 12, 20, 64


def ids(task: int, length: int, seed: int) -> dict[str, Tensor]:
    """Tokens of a task: five of the vocabulary, others for each task."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(5, (1, length), generator=generator)
    return {"input_ids": 2 + task * 5 + drawn}


def inputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each linear module sees, (tok, d_in), written here again."""
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) != 0
    return {name: x[mask] for name, x in seen.items()}


def full(
    experts: Mapping[str, Expert],
    seen: Mapping[str, Tensor],
    *,
    top_k: int = 4,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Each expert's share of Arrow's weight over all tokens and modules, from the definition."""
    weight = dict.fromkeys(experts, 0.0)
    for name, x in seen.items():
        here = {e: v.deltas[name].top_direction() for e, v in experts.items() if name in v.deltas}
        if not here:
            continue
        scores = (x.double() @ torch.stack(list(here.values())).double().T).abs() / temperature
        for row in scores:
            best = row.argsort(descending=True)[:top_k]
            for i, share in zip(best.tolist(), row[best].softmax(0).tolist(), strict=True):
                weight[list(here)[i]] += share
    total = sum(weight.values())
    return {name: one / total for name, one in weight.items()}


@pytest.fixture(scope="module")
def many() -> Callable[[nn.Module], dict[str, Expert]]:
    """240 experts, 20 for each task: A is the mean of what a module sees of the task, and noise."""
    made: dict[str, Expert] = {}

    def make(model: nn.Module) -> dict[str, Expert]:
        generator = torch.Generator().manual_seed(0)
        shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for task in range(0 if made else TASKS):
            mean = {n: x.mean(0) for n, x in inputs_of(model, ids(task, 60, 1000)).items()}
            for i in range(EACH):
                deltas = {}
                for name, x in mean.items():
                    d_out, d_in = shapes[name]
                    noise = torch.randn(d_in, generator=generator) / d_in**0.5
                    row = (x / x.norm() + noise)[None]
                    deltas[name] = LoRADelta(row, torch.randn(d_out, 1, generator=generator))
                made[f"t{task:02d}-{i:02d}"] = Expert("llama", deltas)
        return made

    return make


def in_memory(experts: Mapping[str, Expert]) -> Library:
    library = Library(MemoryStore())
    for name, expert in experts.items():
        library.add(expert, name)
    return library


@pytest.fixture
def zoo(llama: Any, mixed: Callable[..., dict[str, Expert]]) -> tuple[Library, dict[str, Expert]]:
    """Both kinds, several ranks and signatures; one module has one expert, one has none."""
    experts = mixed(llama)
    return in_memory(experts), experts


# -- what it finds --------------------------------------------------------------------------------


def test_where_all_are_candidates_shares_are_arrow_s(llama: Any, many: Any) -> None:
    experts = dict(list(many(llama).items())[::6])
    held = catalogue(in_memory(experts))
    for task, length in ((0, 1), (3, 9), (7, 30)):
        inputs = ids(task, length, seed=task)
        for options in ({}, {"top_k": 1}, {"top_k": 7, "temperature": 0.3}):
            wanted = full(experts, inputs_of(llama, inputs), **options)
            found = shortlist(held, llama, inputs, size=100, **options)
            assert found.keys() == experts.keys()
            for name, share in found.items():
                assert share == pytest.approx(wanted[name], abs=1e-5)
            assert list(found.values()) == sorted(found.values(), reverse=True)
            few = shortlist(held, llama, inputs, size=5, **options)
            assert list(few.items()) == list(found.items())[:5]


def test_it_keeps_arrow_s_weight(llama: Any, many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 240 experts, by way of 32 candidates."""
    monkeypatch.setattr(module, "CANDIDATES", 32)
    experts = many(llama)
    held = catalogue(in_memory(experts))
    kept = []
    for task in range(0, TASKS, 2):
        inputs = ids(task, 40, seed=task)
        wanted = full(
            experts, {n: x[module._spread(40)] for n, x in inputs_of(llama, inputs).items()}
        )
        found = shortlist(held, llama, inputs, size=20)
        best = sum(sorted(wanted.values())[-20:])
        kept.append(sum(wanted[name] for name in found) / best)
        assert best > 0.4  # there is something to find
    assert sum(kept) / len(kept) > 0.95
    assert min(kept) > 0.9


def test_the_first_stage_is_the_energy_in_standard_deviations(llama: Any, many: Any) -> None:
    """Exact where no direction is lost: two tokens, and no module wider than a sketch."""
    experts = dict(list(many(llama).items())[::10])
    held = catalogue(in_memory(experts))
    packs = fitting(held, llama)
    inputs = ids(4, 2, seed=0)
    wanted = dict.fromkeys(experts, 0.0)
    for name, x in inputs_of(llama, inputs).items():
        rows = torch.stack([experts[e].deltas[name].top_direction() for e in experts]).double()
        unit = (x / x.norm(dim=1, keepdim=True)).double()
        energy = (unit @ rows.T).square().sum(0)
        z = (energy - energy.mean()) / energy.std(correction=0)
        for expert, value in zip(experts, z.tolist(), strict=True):
            wanted[expert] += value
    (found,) = estimate(packs, look(llama, inputs, list(packs[0].shapes)))
    for name, value in zip(packs[0].names, found.tolist(), strict=True):
        assert value == pytest.approx(wanted[name], abs=2e-3)


@pytest.mark.parametrize("candidates", [3, 256])
def test_experts_of_several_signatures(
    llama: Any,
    zoo: tuple[Library, dict[str, Expert]],
    monkeypatch: pytest.MonkeyPatch,
    candidates: int,
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    library, experts = zoo
    held = catalogue(library)
    assert len(held.packs) > 2
    inputs = ids(1, 12, seed=0)
    found = shortlist(held, llama, inputs, size=len(experts), top_k=2)
    wanted = full(experts, inputs_of(llama, inputs), top_k=2)
    assert found == pytest.approx(wanted, abs=1e-5)
    one = shortlist(held, llama, inputs, size=1, top_k=2)
    assert len(one) == 1


def test_estimates_are_comparable_between_signatures(llama: Any, many: Any) -> None:
    """The same experts in one pack or in two, by a module more, rank alike where they are alike."""
    experts = dict(list(many(llama).items())[::12])
    last = max(next(iter(experts.values())).deltas)
    fewer = {
        name: Expert(e.base, {m: d for m, d in e.deltas.items() if m != last or i % 2})
        for i, (name, e) in enumerate(experts.items())
    }
    inputs = ids(2, 20, seed=0)
    scores = []
    for group in (experts, fewer):
        packs = fitting(catalogue(in_memory(group)), llama)
        seen = look(llama, inputs, sorted({m for p in packs for m in p.shapes} - {last}))
        values = torch.cat(estimate(packs, seen)).tolist()
        names = [n for p in packs for n in p.names]
        scores.append(dict(zip(names, values, strict=True)))
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


# -- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_looked_at(
    llama: Any, zoo: tuple[Library, dict[str, Expert]], prompts: Any, side: str
) -> None:
    library, experts = zoo
    held, batch = catalogue(library), prompts(side)
    wanted = full(experts, inputs_of(llama, batch))
    found = shortlist(held, llama, batch)
    assert found == pytest.approx(wanted, abs=1e-5)
    alone = [
        {"input_ids": row[mask != 0][None]}
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    single = [shortlist(held, llama, one) for one in alone]
    for name, share in found.items():  # 4 tokens and 7, which count alike
        assert share == pytest.approx((4 * single[0][name] + 7 * single[1][name]) / 11, abs=1e-4)


def test_a_long_prompt_is_looked_at_evenly(
    llama: Any, zoo: tuple[Library, dict[str, Expert]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", 5)
    library, experts = zoo
    batch = {"input_ids": torch.cat([ids(t, 21, seed=t)["input_ids"] for t in (1, 5)])}
    seen = inputs_of(llama, batch)
    places = [0, 5, 10, 15, 20]
    picked = torch.tensor(places + [21 + place for place in places])
    wanted = full(experts, {name: x[picked] for name, x in seen.items()})
    assert shortlist(catalogue(library), llama, batch) == pytest.approx(wanted, abs=1e-5)
    assert module._spread(3).tolist() == [0, 1, 2]
    assert module._spread(6).tolist() == [0, 1, 2, 4, 5]


def test_modules_that_see_one_tensor_keep_it_once(llama: Any) -> None:
    layer = "model.layers.0"
    names = [f"{layer}.self_attn.{m}_proj" for m in "qkvo"]
    names += [f"{layer}.mlp.{m}_proj" for m in ("gate", "up", "down")]
    seen = look(llama, ids(0, 9, seed=0), names)
    q, k, v, o, gate, up, _ = (seen[name] for name in names)
    assert q is k is v
    assert gate is up
    assert o is not q
    assert gate is not q
    for name, x in inputs_of(llama, ids(0, 9, seed=0)).items():
        if name in names:
            assert torch.allclose(seen[name], x, atol=1e-6)


def test_any_architecture(any_model: Any, mixed: Callable[..., dict[str, Expert]]) -> None:
    experts = mixed(any_model)
    found = shortlist(catalogue(in_memory(experts)), any_model, ids(3, 8, seed=0))
    assert found.keys() == experts.keys()
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


def test_the_model_is_left_as_it_was(llama: Any, zoo: tuple[Library, dict[str, Expert]]) -> None:
    held = catalogue(zoo[0])
    with pytest.raises(IndexError):
        shortlist(held, llama, {"input_ids": torch.tensor([[VOCAB]])})
    shortlist(held, llama, ids(0, 4, seed=0))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())


# -- what it does not take ------------------------------------------------------------------------


def test_what_cannot_be_asked(llama: Any, zoo: tuple[Library, dict[str, Expert]]) -> None:
    held, inputs = catalogue(zoo[0]), ids(0, 4, seed=0)
    with pytest.raises(UsageError, match="1 expert or more; got size 0"):
        shortlist(held, llama, inputs, size=0)
    with pytest.raises(UsageError, match="top_k is 1 or more"):
        shortlist(held, llama, inputs, top_k=0)
    with pytest.raises(UsageError, match="temperature above 0; got 4 and 0"):
        shortlist(held, llama, inputs, temperature=0.0)
    with pytest.raises(UsageError, match="no token; got 1 of length 4"):
        shortlist(held, llama, inputs | {"attention_mask": torch.zeros(1, 4)})
    with pytest.raises(UsageError, match="one expert at least"):
        arrow(held, [])
    with pytest.raises(NotFoundError, match=r"no expert named 'wid'.*did you mean wide"):
        arrow(held, ["wid"])


def test_experts_of_other_base_models_are_left_out(
    llama: Any, zoo: tuple[Library, dict[str, Expert]], tiny: Any, make_lora: Any
) -> None:
    library, experts = zoo
    generator = torch.Generator().manual_seed(0)
    foreign = make_lora(tiny("gpt2"), generator, rank=2)
    library.add(foreign, "foreign")
    first = next(iter(experts["wide"].deltas))
    d_out, d_in = experts["wide"].deltas[first].shape
    taller = Expert("other", {first: LoRADelta(torch.ones(1, d_in), torch.ones(d_out + 1, 1))})
    library.add(taller, "taller")
    inputs = ids(0, 6, seed=0)
    found = shortlist(catalogue(library), llama, inputs)
    assert found == pytest.approx(full(experts, inputs_of(llama, inputs)), abs=1e-5)
    with pytest.raises(BaseMismatchError, match="foreign matches no module"):
        shortlist(catalogue(library, ["foreign"]), llama, inputs)
    with pytest.raises(BaseMismatchError, match="taller does not fit"):
        shortlist(catalogue(library, ["taller"]), llama, inputs)


def test_modules_that_are_not_reached_count_for_nothing(llama: Any, many: Any) -> None:
    experts = dict(list(many(llama).items())[::20])
    packs = fitting(catalogue(in_memory(experts)), llama)
    seen = look(llama, ids(0, 6, seed=0), ["model.layers.0.self_attn.q_proj"])
    (scores,) = estimate(packs, seen)
    assert torch.isfinite(scores).all()
    every = torch.arange(len(scores))
    shares = weigh(packs, every, seen, top_k=4, temperature=1.0)
    wanted = full(experts, seen)
    assert dict(zip(packs[0].names, shares.tolist(), strict=True)) == pytest.approx(
        wanted, abs=1e-5
    )
    assert not weigh(packs, every, {}, top_k=4, temperature=1.0).any()


# -- the router -----------------------------------------------------------------------------------


def same_router(a: Arrow, b: Arrow) -> None:
    for field in (
        "experts",
        "fitted",
        "columns",
        "mix",
        "scope",
        "threshold",
        "top_k",
        "temperature",
    ):
        assert getattr(a, field) == getattr(b, field)
    assert list(a.columns) == list(b.columns)
    assert list(a.prototypes) == list(b.prototypes)
    for name in a.prototypes:
        assert same_tensor(a.prototypes[name], b.prototypes[name])


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2, "temperature": 0.5, "mix": "factors", "scope": "prompt", "threshold": 0.1}],
)
def test_arrow_is_what_fit_gives(
    zoo: tuple[Library, dict[str, Expert]], options: dict[str, Any]
) -> None:
    library, experts = zoo
    held = catalogue(library)
    for names in (list(experts), ["half", "wide"], ["entries"], ["blocks", "alone", "wide"]):
        wanted = Arrow.fit({name: experts[name] for name in names}, **options)
        same_router(arrow(held, names, **options), wanted)
    same_router(arrow(held, ["wide", "half", "wide"]), arrow(held, ["wide", "half"]))


def test_arrow_from_files_is_what_fit_gives(llama: Any, many: Any, tmp_path: Path) -> None:
    """At bfloat16 and rank 8 too, and after the index was read from its files."""
    generator = torch.Generator().manual_seed(0)
    library = Library.open(tmp_path / "library", create=True)
    shapes = next(iter(many(llama).values())).shapes
    for i in range(6):
        deltas = {
            name: LoRADelta(
                torch.randn(8, d_in, generator=generator).bfloat16(),
                torch.randn(d_out, 8, generator=generator).bfloat16(),
                2.0,
            )
            for name, (d_out, d_in) in shapes.items()
        }
        library.add(Expert("llama", deltas), f"e{i}")
    fitted = Arrow.fit(library)
    for _ in range(2):
        same_router(arrow(catalogue(library), list(library)), fitted)


def test_from_prompt_to_routed_model(llama: Any, many: Any, tmp_path: Path) -> None:
    experts = many(llama)
    library = Library.open(tmp_path / "library", create=True)
    for name, expert in list(experts.items())[::4]:
        library.add(expert, name)
    held, inputs = catalogue(library), ids(6, 20, seed=1)
    names = shortlist(held, llama, inputs, size=4)
    shelf = Shelf(library, budget=1 << 20)
    chosen = {name: shelf[name] for name in names}
    router = arrow(held, list(names))
    with torch.no_grad(), attach(llama, chosen, router) as routed:
        found = routed(**inputs).logits
    with torch.no_grad(), attach(llama, chosen, Arrow.fit(chosen)) as routed:
        assert torch.equal(routed(**inputs).logits, found)
    library.add(experts["t00-01"], next(iter(names)), replace=True)
    chosen = {name: shelf[name] for name in names}
    with pytest.raises(UsageError, match="its updates have changed since"):
        attach(llama, chosen, router)


def test_a_shortlist_reads_no_expert(
    llama: Any, many: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untyped: None
) -> None:
    library = Library.open(tmp_path / "library", create=True)
    for name, expert in list(many(llama).items())[::24]:
        library.add(expert, name)
    catalogue(library)

    def refuse(*_: Any) -> None:
        raise AssertionError("an expert was read")

    monkeypatch.setattr(index, "read_packed", refuse)
    monkeypatch.setattr(Library, "packed", refuse)
    monkeypatch.setattr(Library, "manifest", refuse)
    held: Catalogue = catalogue(library)
    names = shortlist(held, llama, ids(0, 9, seed=0), size=3)
    assert len(arrow(held, list(names)).experts) == 3
