"""The routers that look at hidden states, against their definitions: dense matrices, the dense SVD
in float64, and loops over tokens and experts."""

import math
from dataclasses import replace

import pytest
import scipy.sparse.linalg
import torch

from adaptlib.errors import BaseMismatchError, NotFoundError, RefusedError, UsageError
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.routing import LAG, Arrow, CentroidMatching, LoGo, Random, SpectR
from adaptlib.routing.logo import default_module
from adaptlib.routing.spectr import lengths, right_directions
from tests import tiny as texts_of_tests

EXACT = 1e-5


def dense(delta):
    """ΔW in float64, entry by entry where it is sparse."""
    if isinstance(delta, LoRADelta):
        return delta.scale * delta.b.double() @ delta.a.double()
    matrix = torch.zeros(delta.shape, dtype=torch.float64)
    across = delta.shape[1] // delta.block
    for place, value in zip(delta.index.tolist(), delta.values, strict=True):
        row, col = place // across * delta.block, place % across * delta.block
        matrix[row : row + delta.block, col : col + delta.block] = value.double()
    return matrix


def directions(delta, top=8):
    _, values, vt = torch.linalg.svd(dense(delta), full_matrices=False)
    rows = [v for value, v in zip(values, vt, strict=True) if value > 1e-6 * values[0]]
    return rows if isinstance(delta, LoRADelta) else rows[:top]


def inputs(experts, module, tok=5, seed=0):
    d_in = next(e.deltas[module].shape[1] for e in experts.values() if module in e.deltas)
    return torch.randn(tok, d_in, generator=torch.Generator().manual_seed(seed))


def here(experts, module):
    return [name for name, expert in experts.items() if module in expert.deltas]


def spectral(experts, module, x):
    return torch.tensor(
        [
            [
                math.sqrt(sum((v @ t.double()).item() ** 2 for v in rows))
                for rows in (directions(experts[n].deltas[module]) for n in here(experts, module))
            ]
            for t in x
        ]
    )


def chosen(choice, names):
    return [
        {names[i]: w for i, w in zip(index, weight, strict=True)}
        for index, weight in zip(choice.index.tolist(), choice.weight.tolist(), strict=True)
    ]


def error(got, wanted):
    return (got.double() - wanted.double()).abs().max().item()


def many(count, *, rank=3, d_in=24, d_out=20, seed=0):
    """Experts of one module, of ranks 1 to `rank`, one of which has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    experts = {}
    for i in range(count):
        r = 1 + i % rank
        a = torch.randn(r, d_in, generator=generator)
        b = torch.randn(d_out, r, generator=generator) * (i != 1)
        experts[f"e{i}"] = Expert("m", {"q": LoRADelta(a, b, 0.5)})
    return experts


# -- SpectR ---------------------------------------------------------------------------------------


def test_spectr_is_the_length_of_the_projection(any_model, mixed):
    experts = mixed(any_model)
    names, worst = list(experts), 0.0
    router = SpectR.fit(experts, top_k=2)
    for module in router.columns:
        x = inputs(experts, module)
        wanted = spectral(experts, module, x)
        worst = max(worst, error(router.scores(module, x), wanted))
        for row, found in zip(wanted, chosen(router.route(module, x), names), strict=True):
            best = row.argsort(descending=True)[:2].tolist()
            local = here(experts, module)
            assert found == {local[i]: pytest.approx(1 / len(best)) for i in best}
    print(f"SpectR {any_model.config.model_type}: max abs error {worst:.1e}")
    assert worst < EXACT


def test_spectr_of_equal_ranks(llama, equal):
    experts = equal(llama)
    router = SpectR.fit(experts)
    for module in router.columns:
        x = inputs(experts, module)
        assert error(router.scores(module, x), spectral(experts, module, x)) < EXACT


def test_spectr_of_all_tokens_of_a_prompt_is_the_mean(llama, mixed):
    """Scope "prompt": loops over tokens that are no padding, and over the modules of an expert."""
    experts = mixed(llama)
    names = list(experts)
    router = SpectR.fit(experts, top_k=2, scope="prompt", weights="softmax")
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    xs = {m: inputs(experts, m, tok=8).unflatten(0, (2, 4)) for m in router.columns}
    seen = {m: router.look(m, x, mask) for m, x in xs.items()}
    got = router.weigh(seen, None)
    for s in range(2):
        means = {}
        for i, name in enumerate(names):
            rows = []
            for module, x in xs.items():
                if module in experts[name].deltas:
                    scores = spectral(experts, module, x[s][mask[s]]).mean(0)
                    rows.append(scores[here(experts, module).index(name)])
            means[i] = (sum(rows) / len(rows)).item()
        best = sorted(means, key=lambda i: -means[i])[:2]
        total = sum(math.exp(means[i]) for i in best)
        wanted = [math.exp(means[i]) / total if i in best else 0.0 for i in means]
        assert got[s].tolist() == pytest.approx(wanted, abs=EXACT)


def test_an_expert_that_sees_nothing_scores_nothing():
    experts = many(5)
    router = SpectR.fit(experts, top_k=1)
    x = inputs(experts, "q")
    assert router.ranks["q"].tolist() == [1, 0, 3, 1, 2]
    assert bool((router.scores("q", x)[:, 1] == 0).all())
    assert error(router.scores("q", x), spectral(experts, "q", x)) < EXACT


def test_directions_are_orthonormal_and_those_of_singular_value_zero_are_dropped():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 24, generator=generator), torch.randn(20, 4, generator=generator)
    twice = LoRADelta(torch.cat([a, a]), torch.cat([b, -0.3 * b], dim=1), 2.0)
    rows = right_directions(twice, 8)
    assert rows.shape == (4, 24)
    assert error(rows @ rows.T, torch.eye(4)) < 1e-6
    assert len(right_directions(LoRADelta(a, b, 0.0), 8)) == 0
    assert len(right_directions(LoRADelta(a, 0 * b), 8)) == 0
    wide = LoRADelta(torch.randn(40, 24, generator=generator), torch.randn(20, 40), 1.0)
    assert len(right_directions(wide, 8)) == 20  # the rank exceeds both sides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_directions_of_half_precision_factors(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 24, generator=generator), torch.randn(20, 3, generator=generator)
    delta = LoRADelta(a.to(dtype), b.to(dtype), 0.5)
    rows = right_directions(delta, 8)
    assert rows.dtype == torch.float32
    wanted = torch.stack(directions(delta))
    assert error(rows.double().T @ rows.double(), wanted.T @ wanted) < 1e-6


@pytest.mark.parametrize("block", [1, 16])
def test_the_top_directions_of_a_large_sparse_update(block):
    """Lanczos, where the matrix is not decomposed whole."""
    generator = torch.Generator().manual_seed(1)
    d_out, d_in = 144, 96
    size = d_out * d_in // block**2
    index = torch.randperm(size, generator=generator)[: size // 4].sort().values
    shape = (len(index),) if block == 1 else (len(index), block, block)
    delta = SparseDelta(index, torch.randn(shape, generator=generator), (d_out, d_in), block)
    for k in (1, 5, 8):
        rows = right_directions(delta, k).double()
        wanted = torch.stack(directions(delta, k))
        assert rows.shape == (k, d_in)
        assert error(rows.T @ rows, wanted.T @ wanted) < 1e-6  # the projection onto their span
        assert error((rows * wanted).sum(1).abs(), torch.ones(k)) < 1e-6  # one by one


@pytest.mark.parametrize("fails", [False, True])
def test_sparse_updates_with_few_singular_values(monkeypatch, fails):
    """Entries of one size, as after the first steps of Adam: there ARPACK may give up."""

    def give_up(*_, **__):
        raise scipy.sparse.linalg.ArpackError(3)

    if fails:
        monkeypatch.setattr(scipy.sparse.linalg, "svds", give_up)
    side = 128
    shuffled = torch.randperm(side, generator=torch.Generator().manual_seed(0))
    values = torch.ones(side)
    values[:4] = 3.0  # of the first four rows
    delta = SparseDelta(torch.arange(side) * side + shuffled, values, (side, side))
    rows = right_directions(delta, 4).double()
    wanted = torch.zeros(side, side, dtype=torch.float64)
    for column in shuffled[:4].tolist():
        wanted[column, column] = 1
    assert error(rows.T @ rows, wanted) < 1e-6
    one = SparseDelta(torch.arange(side), torch.full((side,), 0.1), (side, side))  # of rank 1
    rows = right_directions(one, 4)
    assert error(rows.abs(), torch.full((1, side), side**-0.5)) < 1e-6


def test_lengths_of_parts():
    projected = torch.tensor([[3.0, 4.0, 1.0, 2.0, 2.0]])
    assert lengths(projected, torch.tensor([2, 0, 3])).tolist() == [[5.0, 0.0, 3.0]]
    assert lengths(projected[:, [0, 1, 0, 1]], torch.tensor([2, 2])).tolist() == [[5.0, 5.0]]
    assert lengths(projected[:, :0], torch.tensor([0, 0])).tolist() == [[0.0, 0.0]]


def test_closeness_is_the_share_of_a_token_that_the_best_expert_sees(llama, mixed):
    experts = mixed(llama)
    router = SpectR.fit(experts)
    module = next(iter(router.columns))
    x = inputs(experts, module)
    close = router.closeness(x, router.scores(module, x))
    wanted = spectral(experts, module, x).amax(1) / x.double().norm(dim=1)
    assert error(close, wanted) < EXACT
    assert error(close, router.closeness(7 * x, router.scores(module, 7 * x))) < EXACT
    assert bool((close <= 1 + 1e-6).all())


# -- LAG ------------------------------------------------------------------------------------------


def slow_lag(experts, module, x, shortlist):
    local = here(experts, module)
    rows = {n: directions(experts[n].deltas[module]) for n in local}
    best = []
    for t in x.double():
        arrows = {n: abs((rows[n][0] @ t).item()) if rows[n] else 0.0 for n in local}
        short = sorted(local, key=lambda n: -arrows[n])[:shortlist]
        scores = {n: math.sqrt(sum((v @ t).item() ** 2 for v in rows[n])) for n in short}
        best.append([scores.get(n, -math.inf) for n in local])
    return torch.tensor(best)


@pytest.mark.parametrize("shortlist", [1, 2, 3])
def test_lag_is_spectr_among_arrows_shortlist(any_model, mixed, shortlist):
    experts = mixed(any_model)
    router = LAG.fit(experts, shortlist=shortlist)
    worst = 0.0
    for module in router.columns:
        x = inputs(experts, module)
        got, wanted = router.scores(module, x), slow_lag(experts, module, x, shortlist)
        assert torch.equal(got.isinf(), wanted.isinf())
        finite = ~wanted.isinf()
        worst = max(worst, error(got[finite], wanted[finite]))
        index, weight = router.route(module, x)
        local = torch.tensor([list(experts).index(n) for n in here(experts, module)])
        assert torch.equal(index[:, 0], local[wanted.argmax(1)])
        assert bool((weight == 1).all())
    print(f"LAG {any_model.config.model_type}: max abs error {worst:.1e}")
    assert worst < EXACT


@pytest.mark.parametrize("tok", [1, 2, 40])
@pytest.mark.parametrize("top_k", [1, 3])
def test_lag_of_few_tokens_among_many_experts(tok, top_k):
    """One token touches the rows of its shortlist only; many tokens touch all rows."""
    experts = many(70)
    router = LAG.fit(experts, shortlist=3, top_k=top_k)
    x = inputs(experts, "q", tok)
    got, wanted = router.scores("q", x), slow_lag(experts, "q", x, 3)
    assert torch.equal(got.isinf(), wanted.isinf())
    assert error(got[~got.isinf()], wanted[~got.isinf()]) < EXACT
    index, weight = router.route("q", x)
    top = wanted.topk(top_k, dim=1)
    assert torch.equal(index, top.indices)
    assert error(weight, top.values.softmax(1)) < EXACT


def test_lag_is_between_arrow_and_spectr(llama, mixed):
    experts = mixed(llama)
    arrow, spectr = Arrow.fit(experts, top_k=1), SpectR.fit(experts, top_k=1)
    first, last = LAG.fit(experts, shortlist=1), LAG.fit(experts, shortlist=len(experts))
    differ = 0
    for module in arrow.columns:
        x = inputs(experts, module, tok=50)
        for one, other in ((first, arrow), (last, spectr)):
            assert torch.equal(one.route(module, x).index, other.route(module, x).index)
            assert torch.equal(one.route(module, x).weight, other.route(module, x).weight)
        differ += int((arrow.route(module, x).index != spectr.route(module, x).index).sum())
    assert differ > 0  # or this would show nothing


def test_a_threshold_does_not_make_lag_look_at_the_shortlist(llama, mixed):
    experts = mixed(llama)
    router, all_of_them = LAG.fit(experts, shortlist=1), SpectR.fit(experts)
    mask = torch.tensor([[False, True, True, True]])
    for module in router.columns:
        x = inputs(experts, module, tok=4)[None]
        seen = router.look(module, x, mask)
        assert seen.shape == (1, 1)
        best = slow_lag(experts, module, x[0, 1:], 1).amax(1) / x[0, 1:].double().norm(dim=1)
        assert error(router.confidence({module: seen}, None), best.mean()) < EXACT
        assert seen <= all_of_them.look(module, x, mask)[:, -1] + 1e-6


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "prompt"}, "a shortlist for each token, so a whole prompt has none"),
        ({"scope": "sequence"}, "a shortlist for each token, so a whole sequence has none"),
        ({"shortlist": 0}, "shortlist is 1 or more; got 0"),
        ({"shortlist": 2, "top_k": 3}, "top_k are of the shortlist, so at most 2; got 3"),
        ({"sparse_rank": 0}, "sparse_rank is 1 or more; got 0"),
    ],
)
def test_options_of_lag_that_cannot_be_meant(options, words):
    with pytest.raises(UsageError, match=words):
        LAG.fit(many(5), **options)


def test_directions_that_do_not_match_the_columns():
    router = SpectR.fit(many(3))
    with pytest.raises(UsageError, match="name different modules"):
        replace(router, ranks={})
    with pytest.raises(UsageError, match=r"q wants ranks of 3 experts that sum to .* 4; got"):
        replace(router, ranks={"q": torch.tensor([1, 2, 3])})


# -- together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [SpectR.fit, Random.fit, LAG.fit])
def test_modules_that_see_the_same_input_are_routed_together(llama, make_lora, fit):
    generator = torch.Generator().manual_seed(3)
    attention = "model.layers.0.self_attn"
    group = tuple(f"{attention}.{part}_proj" for part in "qkv")
    experts = {
        "one": make_lora(llama, generator, rank=2),
        "two": make_lora(llama, generator, rank=5, modules=group),
        "more": make_lora(llama, generator, rank=3, modules=[group[0], *group[1:]]),
    }
    router = fit(experts)
    cpu = torch.device("cpu")
    placed = router.place(dict.fromkeys(router.columns, cpu), [group])
    x = inputs(experts, group[0])
    together = placed.route_all(group, x)
    for i, module in enumerate(group):
        alone = router.route(module, x)
        assert torch.equal(together.index[:, i], alone.index)
        torch.testing.assert_close(together.weight[:, i], alone.weight)
        torch.testing.assert_close(placed.scores(module, x), router.scores(module, x))


# -- LoGo -----------------------------------------------------------------------------------------


def slow_logo(experts, module, h, score):
    found = {}
    for name in here(experts, module):
        y = dense(experts[name].deltas[module]) @ h.double()
        if score == "norm":
            found[name] = y.norm().item()
        else:
            p = (y - y.max()).exp() / (y - y.max()).exp().sum()
            found[name] = 1 / (-sum(v * math.log(v) for v in p.tolist() if v > 0) + 1e-6)
    return found


@pytest.mark.parametrize("score", ["norm", "entropy"])
@pytest.mark.parametrize("top_k", [2, 20])
def test_logo_weighs_by_the_answer_to_the_last_real_token(any_model, mixed, score, top_k):
    experts = mixed(any_model)
    names, worst = list(experts), 0.0
    for module in experts["wide"].deltas:
        router = LoGo.fit(experts, module=module, score=score, top_k=top_k)
        x = inputs(experts, module, tok=12).unflatten(0, (3, 4))
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
        seen = {module: router.look(module, x, mask)}
        weights = router.weigh(seen, None)
        confidence = router.confidence(seen, None)
        for s, last in enumerate((3, 1, 3)):
            scores = slow_logo(experts, module, x[s, last], score)
            worst = max(worst, error(seen[module][s, :-1], torch.tensor(list(scores.values()))))
            best = sorted(scores, key=lambda n: -scores[n])[:top_k]
            total = sum(scores[n] for n in best)
            wanted = torch.tensor([scores[n] / total if n in best else 0.0 for n in names])
            worst = max(worst, error(weights[s], wanted))
            length = x[s, last].norm().item() if score == "norm" else 1.0
            assert confidence[s].item() == pytest.approx(max(scores.values()) / length, rel=1e-5)
    print(f"LoGo {any_model.config.model_type} {score}: max abs error {worst:.1e}")
    assert worst < EXACT


@pytest.mark.parametrize("kinds", [("wide", "alone"), ("entries", "blocks")])
@pytest.mark.parametrize("score", ["norm", "entropy"])
def test_logo_of_experts_of_one_kind(llama, mixed, kinds, score):
    experts = {name: expert for name, expert in mixed(llama).items() if name in kinds}
    router = LoGo.fit(experts, score=score)
    x = inputs(experts, router.module, tok=1)[None]
    got = router.look(router.module, x, torch.ones(1, 1).bool())[0, :-1]
    wanted = slow_logo(experts, router.module, x[0, 0], score)
    assert error(got, torch.tensor(list(wanted.values()))) < EXACT


def test_logo_keeps_no_more_than_the_score_needs(llama, mixed):
    experts = mixed(llama)
    for score in ("norm", "entropy"):
        router = LoGo.fit(experts, score=score)
        rank = int(router.ranks.sum())
        assert len(router.rows) == rank
        assert len(router.out) == (0 if score == "norm" else rank)


def test_logo_never_chooses_an_expert_that_lacks_the_module(llama, mixed):
    experts = mixed(llama)
    router = LoGo.fit(experts, module=next(iter(experts["half"].deltas)))
    lacking = [name for name in experts if router.module not in experts[name].deltas]
    assert lacking
    assert set(router.used) == set(experts) - set(lacking)
    assert router.probes == (router.module,)


def test_logo_of_updates_that_are_all_zero():
    zero = LoRADelta(torch.randn(2, 6), torch.zeros(5, 2))
    router = LoGo.fit({name: Expert("m", {"q": zero}) for name in "abc"})
    seen = {"q": router.look("q", torch.randn(2, 3, 6), torch.ones(2, 3).bool())}
    assert error(router.weigh(seen, None), torch.full((2, 3), 1 / 3)) < 1e-6


def test_logo_in_half_precision_scores_in_float32(llama, mixed):
    experts = mixed(llama)
    router = LoGo.fit(experts)
    x = inputs(experts, router.module, tok=3)[None].bfloat16()
    got = router.look(router.module, x, torch.ones(1, 3).bool())
    wanted = slow_logo(experts, router.module, x[0, -1].float(), "norm")
    assert got.dtype == torch.float32
    assert error(got[0, :-1], torch.tensor(list(wanted.values()))) < EXACT


def test_the_module_that_logo_looks_at():
    layers = [
        f"model.layers.{i}.{part}"
        for i in (2, 10)
        for part in ("mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
    ]
    every = dict.fromkeys(layers, (0, 1, 2, 3))
    assert default_module(every, 4) == "model.layers.10.self_attn.q_proj"
    rare = every | {"model.layers.10.self_attn.q_proj": (0,)}
    assert default_module(rare, 4) == "model.layers.2.self_attn.q_proj"
    no_queries = {m: i for m, i in every.items() if "q_proj" not in m}
    assert default_module(no_queries, 4) == "model.layers.10.mlp.up_proj"
    assert default_module({"transformer.h.3.attn.c_attn": (0,), "lm_head": (0, 1)}, 2) == (
        "transformer.h.3.attn.c_attn"
    )
    assert default_module({"a": (0,), "b": (1,), "c": (2,)}, 3) == "a"  # nothing in common


def test_options_of_logo_that_cannot_be_meant(untyped):
    with pytest.raises(NotFoundError, match="no expert has module k; 1 modules are adapted") as e:
        LoGo.fit(many(2), module="k")
    assert e.value.hint == "module='q', or None"
    with pytest.raises(UsageError, match="score is one of norm, entropy; got 'length'"):
        LoGo.fit(many(2), score="length")
    with pytest.raises(UsageError, match="top_k is 1 or more; got 0"):
        LoGo.fit(many(2), top_k=0)


# -- centroid matching ----------------------------------------------------------------------------


SAMPLES = {
    "wide": ["a b c", "d e f g h", "b"],
    "alone": ["x y z", "z z z z"],
    "half": ["m n o p q r s"],
    "entries": ["c c", "d d", "e e"],
    "blocks": ["w w w w w", "a"],
}


@pytest.fixture
def tokenizer():
    return texts_of_tests.make_tokenizer()


def slow_centroid(model, module, tokenizer, texts):
    """One sample at a time, without padding."""
    directions = []
    for text in texts:
        seen = []
        where = dict(model.named_modules())[module]
        handle = where.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(text).input_ids]))
        handle.remove()
        h = seen[0].reshape(-1, seen[0].shape[-1])[-1].double()
        directions.append(h / h.norm())
    mean = torch.stack(directions).mean(0)
    return mean / mean.norm()


def test_cm_is_the_cosine_with_the_mean_direction_of_the_samples(any_model, mixed, tokenizer):
    experts = mixed(any_model)
    options = {"model": any_model, "tokenizer": tokenizer, "samples": SAMPLES, "count": 2}
    router = CentroidMatching.fit(experts, **options)
    worst = 0.0
    for module in router.columns:
        x = inputs(experts, module)
        wanted = torch.stack(
            [
                slow_centroid(any_model, module, tokenizer, SAMPLES[name][:2])
                for name in here(experts, module)
            ]
        )
        cosines = torch.stack([torch.stack([t @ c for c in wanted]) / t.norm() for t in x.double()])
        got = router.scores(module, x)
        worst = max(worst, error(got, cosines))
        assert error(router.closeness(x, got), cosines.amax(1)) < EXACT
    print(f"CM {any_model.config.model_type}: max abs error {worst:.1e}")
    assert worst < EXACT


def test_cm_leaves_the_model_as_it_was(llama, mixed, tokenizer):
    llama.train()
    llama.model.layers[1].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    try:
        CentroidMatching.fit(mixed(llama), model=llama, tokenizer=tokenizer, samples=SAMPLES)
        assert {name: module.training for name, module in llama.named_modules()} == before
        assert not any(module._forward_pre_hooks for module in llama.modules())
        assert all(p.grad is None for p in llama.parameters())
    finally:
        llama.eval()


def test_cm_wants_samples_of_every_expert(llama, mixed, tokenizer, untyped):
    options = {"model": llama, "tokenizer": tokenizer}
    some = {name: texts for name, texts in SAMPLES.items() if name != "half"}
    with pytest.raises(UsageError, match=r"wants sample prompts of every expert.* half has none"):
        CentroidMatching.fit(mixed(llama), samples=some, **options)
    with pytest.raises(UsageError, match="a list of texts; half has one text"):
        CentroidMatching.fit(mixed(llama), samples=some | {"half": "a b"}, **options)
    with pytest.raises(UsageError, match="a sample of half has no tokens"):
        CentroidMatching.fit(mixed(llama), samples=some | {"half": [""]}, **options)
    with pytest.raises(UsageError, match="count is 1 or more; got 0"):
        CentroidMatching.fit(mixed(llama), samples=SAMPLES, count=0, **options)


def test_cm_of_another_model(llama, tiny, mixed, tokenizer):
    with pytest.raises(BaseMismatchError, match="which this model lacks"):
        CentroidMatching.fit(mixed(llama), model=tiny("gpt2"), tokenizer=tokenizer, samples=SAMPLES)


def test_cm_uses_the_end_of_a_sample_that_is_too_long(llama, make_lora, tokenizer):
    generator = torch.Generator().manual_seed(0)
    experts = {"e": make_lora(llama, generator, rank=2)}
    limit = llama.config.max_position_embeddings
    long = " ".join("abcdefg"[i % 7] for i in range(limit + 9))
    end = " ".join(long.split()[-limit:])
    one, two = (
        CentroidMatching.fit(experts, model=llama, tokenizer=tokenizer, samples={"e": [text]})
        for text in (long, end)
    )
    for module in one.columns:
        assert torch.equal(one.centroids[module], two.centroids[module])


def test_cm_where_a_module_does_not_run(llama, make_lora, tokenizer):
    model = torch.nn.ModuleDict({"used": llama, "unused": torch.nn.Linear(32, 32)})
    model.config, model.device = llama.config, llama.device
    model.forward = lambda **given: llama(**given)
    delta = LoRADelta(torch.randn(2, 32), torch.randn(32, 2))
    with pytest.raises(RefusedError, match="unused did not run on the samples"):
        CentroidMatching.fit(
            {"e": Expert("m", {"unused": delta})},
            model=model,
            tokenizer=tokenizer,
            samples={"e": ["a b"]},
        )


# -- random ---------------------------------------------------------------------------------------


def test_random_is_arrow_with_random_directions(llama, mixed):
    experts = mixed(llama)
    router = Random.fit(experts, seed=3, top_k=2)
    arrow = Arrow(
        experts=router.experts,
        columns=router.columns,
        mix="outputs",
        prototypes=router.prototypes,
        top_k=2,
    )
    for module, rows in router.prototypes.items():
        assert error(rows.norm(dim=1), torch.ones(len(rows))) < 1e-6
        x = inputs(experts, module)
        assert torch.equal(router.route(module, x).index, arrow.route(module, x).index)
        assert torch.equal(router.route(module, x).weight, arrow.route(module, x).weight)


def test_a_random_direction_depends_on_seed_module_and_name_alone(llama, mixed):
    experts = mixed(llama)
    router, again = Random.fit(experts), Random.fit(experts)
    alone = Random.fit({"half": experts["half"]})
    renamed = Random.fit({"other": experts["half"]})
    reseeded = Random.fit(experts, seed=1)
    columns = list(experts).index("half")
    seen = []
    for module in alone.columns:
        row = router.prototypes[module][router.columns[module].index(columns)]
        assert torch.equal(router.prototypes[module], again.prototypes[module])
        assert torch.equal(alone.prototypes[module][0], row)
        seen += [row, renamed.prototypes[module][0], reseeded.prototypes[module][0]]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert len(one) != len(other) or abs(one @ other) < 0.9
