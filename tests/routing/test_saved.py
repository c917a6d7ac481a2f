"""Routers in a library: bit for bit, by digest, kept from gc; and thresholds that are measured."""

import dataclasses
from datetime import timedelta

import pytest
import torch

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.experts import Library
from adaptlib.experts.records import save_record
from adaptlib.routing import Arrow, Named, Uniform, attach, calibrate, load_router, save_router


@pytest.fixture
def library(tmp_path, llama, mixed):
    library = Library.open(tmp_path / "lib", create=True)
    for name, expert in mixed(llama).items():
        library.add(expert, name)
    return library


def equal(one, other):
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict) and field.name != "columns":
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
            assert all(a[key].dtype == b[key].dtype for key in a)
        else:
            assert a == b, field.name


def test_a_router_comes_back_bit_for_bit(library, llama, prompts):
    experts = dict(library)
    for made in (
        Arrow.fit(experts, top_k=2, temperature=0.7, scope="sequence", threshold=0.123456789),
        Uniform.fit(experts),
        Named.fit(experts, expert="half"),
    ):
        save_router(library, "mine", made)
        router, held = load_router(Library.open(library.path), "mine")
        equal(router, made)
        assert list(held) == sorted(experts)
        with attach(llama, held, router) as routed, torch.no_grad():
            got = routed(**prompts("left")).logits
        with attach(llama, experts, made) as routed, torch.no_grad():
            assert torch.equal(got, routed(**prompts("left")).logits)


def test_a_placed_router_is_the_same_router(library):
    made = Arrow.fit(dict(library))
    devices = {module: torch.device("cpu") for module in made.columns}
    modules = [m for m in made.columns if m.endswith(("gate_proj", "up_proj"))]
    placed = made.place(devices, [tuple(modules[:2])])
    assert save_router(library, "one", made) == save_router(library, "other", placed)


def test_it_keeps_its_experts_when_their_names_move_on(library, make_lora, llama):
    router = Arrow.fit(dict(library))
    save_router(library, "mine", router)
    before = library.digest("half")
    other = make_lora(llama, torch.Generator().manual_seed(77), rank=2)
    library.add(other, "half", replace=True)
    library.remove("wide")
    library.gc(grace=timedelta(0), history=timedelta(0))
    loaded, held = load_router(library, "mine")
    assert library.digest("half") != before
    for name in held:
        for module in held[name].deltas:
            place = loaded.columns[module].index(loaded.experts.index(name))
            direction = held[name].deltas[module].top_direction()
            torch.testing.assert_close(loaded.prototypes[module][place], direction)
    assert library.verify().problems == ()


def test_what_is_no_router(library):
    with pytest.raises(NotFoundError, match="no routers named 'none'"):
        load_router(library, "none")
    save_record(library.store, "routers", "odd", {"schema": "adaptlib.router/9", "experts": {}})
    with pytest.raises(CorruptError, match="routers/odd is no router that this version knows"):
        load_router(library, "odd")
    with pytest.raises(NotFoundError, match="no expert named 'gone'"):
        save_router(library, "x", Uniform.fit({"gone": library["half"]}))


class Words:
    """A tokenizer of numbers."""

    pad_token_id = 0
    eos_token_id = None

    def __call__(self, text, verbose=True):
        return {"input_ids": [int(word) for word in text.split()]}


def test_a_threshold_keeps_the_share_that_was_asked_for(llama, mixed):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(1, 64, (40, 6), generator=generator)
    texts = [" ".join(map(str, row[: 2 + i % 5].tolist())) for i, row in enumerate(draws)]
    router = Arrow.fit(mixed(llama), top_k=2)
    done = calibrate(router, llama, Words(), texts, foreign=["9 9 9 9", "8 8"], keep=0.9)
    assert done.kept == pytest.approx(0.9)
    slow = []
    for text in texts:
        with attach(llama, mixed(llama), dataclasses.replace(router, threshold=0.0)) as routed:
            routed(torch.tensor([Words()(text)["input_ids"]]))
            slow.append(routed.confidence.item())
    assert done.router.threshold == pytest.approx(sorted(slow)[4], abs=1e-6)
    assert 0 <= done.refused <= 1
    assert 0 <= done.separation <= 1
    assert calibrate(router, llama, Words(), texts, keep=1.0).kept == 1.0


def test_the_confidence_of_arrow_is_the_mean_cosine_of_its_first_choice(llama, mixed):
    experts = mixed(llama)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0]}))
        for name, module in llama.named_modules()
        if any(name in e.deltas for e in experts.values())
    ]
    with torch.no_grad():
        llama(torch.tensor([[5, 6, 7]]))
    for hook in hooks:
        hook.remove()
    best = []
    for module, x in seen.items():
        directions = [
            torch.linalg.svd(e.deltas[module].dense().double(), full_matrices=False).Vh[0]
            for e in experts.values()
            if module in e.deltas
        ]
        for token in x.double():
            best.append(max(abs(token @ v) / token.norm() for v in directions))
    wanted = torch.stack(best).mean().item()
    with attach(llama, experts, Arrow.fit(experts, threshold=0.0)) as routed:
        routed(torch.tensor([[5, 6, 7]]))
        assert routed.confidence.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_calibrated(llama, mixed):
    router = Arrow.fit(mixed(llama))
    with pytest.raises(UsageError, match="a threshold wants prompts"):
        calibrate(router, llama, Words(), [])
    with pytest.raises(UsageError, match="keep is a share above 0, up to 1; got 0"):
        calibrate(router, llama, Words(), ["1 2"], keep=0)
    with pytest.raises(UsageError, match="router uniform has no measure"):
        calibrate(Uniform.fit(mixed(llama)), llama, Words(), ["1 2"])
    with pytest.raises(UsageError, match="finds no token in ''"):
        calibrate(router, llama, Words(), ["1", ""])
