"""Layers of learned routing against the formulas of the papers, written out in loops; and PEFT's
Polytropon, where settings coincide."""

import itertools

import pytest
import torch
from peft import PolyConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import BaseMismatchError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.learned.skills import MixedSkills, TaskSkills, imbalance, prompts_of
from adaptlib.training.encode import IGNORED, Example, collate
from adaptlib.training.modules import target_modules
from adaptlib.training.options import TrainOptions
from tests import tiny
from tests.training.conftest import llama

OPTIONS = TrainOptions(rank=3, alpha=6.0)


def batch_of(tasks=(0, 2, 0), seed=0):
    random = torch.Generator().manual_seed(seed)
    examples = []
    for i, task in enumerate(tasks):
        ids = tuple(torch.randint(2, 250, (7 + i,), generator=random).tolist())
        targets = (*[IGNORED] * (4 + i), *ids[4 + i :])
        examples.append(Example(ids, targets, task))
    return collate(examples, 1)


def stir(learner, seed=1):
    """Every number random, so that nothing is hidden by a zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*learner.b.values(), *learner.router.values()]:
            value.copy_(torch.randn(value.shape, generator=random) * 0.3)


def slow_by_task(learner, name, x, tasks):
    """Every example, head, skill and entry alone."""
    z, a, b = (t[name].double() for t in (learner.logits, learner.a, learner.b))
    heads, skills = z.shape[1:]
    d_in, d_out = a.shape[2], b.shape[1]
    out = []
    for tokens, task in zip(x.double(), tasks, strict=True):
        mixed_a, mixed_b = torch.zeros(a.shape[1:]).double(), torch.zeros(b.shape[1:]).double()
        for k, i in itertools.product(range(heads), range(skills)):
            gates = torch.stack([1 / (1 + torch.exp(-z[task, k, j])) for j in range(skills)])
            alpha = gates[i] / gates.sum()
            into = slice(k * d_in // heads, (k + 1) * d_in // heads)
            outof = slice(k * d_out // heads, (k + 1) * d_out // heads)
            mixed_a[:, into] += alpha * a[i][:, into]
            mixed_b[outof] += alpha * b[i][outof]
        out.append(torch.stack([learner.scale * mixed_b @ (mixed_a @ t) for t in tokens]))
    return torch.stack(out)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_task_mixes_its_skills_head_by_head(model, heads):
    modules = target_modules(model, "all-linear")
    learner = TaskSkills(modules, OPTIONS, tasks=3, heads=heads, skills=5)
    stir(learner)
    batch = batch_of()
    learner.reads(batch)
    for name in modules:
        x = torch.randn(3, 4, learner.a[name].shape[2], generator=torch.Generator().manual_seed(2))
        slow = slow_by_task(learner, name, x, batch.tasks.tolist())
        assert (learner.update(name, x).double() - slow).abs().max() < 1e-5


def slow_mope(learner, name, x, mask, *, scope, top_k, temperature):
    rows, bias = (t[name].double() for t in (learner.choosing.rows, learner.choosing.bias))
    a, b = learner.a[name].double(), learner.b[name].double()

    def weights(vector):
        normal = (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()
        scores = [(row @ normal + c).item() for row, c in zip(rows, bias, strict=True)]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        powers = {i: torch.tensor(scores[i] / temperature).double().exp() for i in best}
        return {i: value / sum(powers.values()) for i, value in powers.items()}

    out = []
    for tokens, real in zip(x.double(), mask, strict=True):
        if scope == "token":
            out.append(
                torch.stack(
                    [sum(w * b[i] @ a[i] @ t for i, w in weights(t).items()) for t in tokens]
                )
            )
        else:
            mean = sum(t for t, yes in zip(tokens, real, strict=True) if yes) / int(real.sum())
            chosen = weights(mean)
            mixed_a, mixed_b = (sum(w * t[i] for i, w in chosen.items()) for t in (a, b))
            out.append(torch.stack([mixed_b @ (mixed_a @ t) for t in tokens]))
    return learner.scale * torch.stack(out)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_token_and_by_example(model, scope, top_k):
    modules = target_modules(model, "all-linear")
    learner = MixedSkills(modules, OPTIONS, skills=4, scope=scope, top_k=top_k, temperature=0.5)
    stir(learner)
    batch = batch_of()
    learner.reads(batch)
    mask, tok = prompts_of(batch), batch.input_ids.shape[1]
    for name in modules:
        x = torch.randn(
            3, tok, learner.a[name].shape[2], generator=torch.Generator().manual_seed(2)
        )
        slow = slow_mope(learner, name, x, mask, scope=scope, top_k=top_k or 4, temperature=0.5)
        assert (learner.update(name, x).double() - slow).abs().max() < 1e-5


def made(kind, modules, **options):
    if kind == "mhr":
        return TaskSkills(modules, OPTIONS, tasks=3, heads=2, skills=3, **options)
    scope, _, balance = kind.partition("+")
    return MixedSkills(
        modules, OPTIONS, skills=3, scope=scope, balance=0.3 if balance else 0.0, **options
    )


@pytest.mark.parametrize("kind", ["mhr", "token", "sequence", "token+balance"])
def test_gradients_are_those_of_finite_differences(kind, monkeypatch):
    """In float64, with regard to the input, A, B and the router, of the update and the loss that
    spreads rows."""
    # scores are float32 on purpose; its rounding would hide the difference
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    name, module = next(iter(target_modules(llama(), "all-linear").items()))
    learner = made(kind, {name: module})
    stir(learner)
    learner.reads(batch_of())
    parts = {"a": learner.a, "b": learner.b}
    if kind == "mhr":
        parts["z"] = learner.logits
    else:
        parts |= {"rows": learner.choosing.rows, "bias": learner.choosing.bias}
    tok = learner.batch.input_ids.shape[1]
    x = torch.randn(3, tok, learner.a[name].shape[2], generator=torch.Generator().manual_seed(2))

    def update(x, *values):
        for table, value in zip(parts.values(), values, strict=True):
            table[name] = value
        learner.reads(learner.batch)
        added, extra = learner.update(name, x).sum((0, 1)), learner.extra()
        return added if extra is None else (added, extra)

    given = [x, *(table[name] for table in parts.values())]
    given = [value.detach().double().requires_grad_() for value in given]
    assert torch.autograd.gradcheck(update, given, fast_mode=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_polytropon_as_peft_has_it(heads):
    """PEFT scales by 1/rank and samples gates in training, so: alpha 1, and in eval mode."""
    model, batch = llama(), batch_of()
    names = ("q_proj", "v_proj", "down_proj")
    options = TrainOptions(rank=3, alpha=1.0, target=names)
    modules = target_modules(model, names)
    learner = TaskSkills(modules, options, tasks=3, heads=heads, skills=5)
    stir(learner)
    with learner.installed(), torch.no_grad():
        learner.reads(batch)
        ours = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    config = PolyConfig(
        r=3,
        n_tasks=3,
        n_skills=5,
        n_splits=heads,
        target_modules=list(names),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(model, config).eval()
    for name in modules:
        layer = theirs.get_submodule(f"base_model.model.{name}")
        a = learner.a[name].detach().unflatten(2, (heads, -1))  # skill rank head d
        b = learner.b[name].detach().unflatten(1, (heads, -1))  # skill head d rank
        layer.poly_lora_A["default"].data.copy_(a.permute(2, 0, 3, 1))
        layer.poly_lora_B["default"].data.copy_(b.permute(1, 0, 3, 2))
        router = layer.poly_router["default"]
        router.module_logits.data.copy_(learner.logits[name].detach().flatten(1))
    with torch.no_grad():
        got = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.tasks
        ).logits
    real = batch.attention_mask.bool()
    assert (got - ours)[real].abs().max() < 1e-5


def test_the_prompt_ends_before_the_first_answer():
    batch = batch_of()
    for row, real, labels in zip(
        prompts_of(batch), batch.attention_mask, batch.labels, strict=True
    ):
        first = next(i for i, label in enumerate(labels.tolist()) if label != IGNORED)
        assert row.tolist() == [i <= first and bool(real[i]) for i in range(len(real))]


def test_imbalance_is_one_where_rows_are_spread_and_the_count_where_not():
    even = torch.eye(4).repeat(5, 1) * 50
    assert imbalance(even).item() == pytest.approx(1, abs=1e-5)
    one = torch.zeros(7, 4)
    one[:, 2] = 50.0
    assert imbalance(one).item() == pytest.approx(4, abs=1e-4)
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(3):
        share = sum(row.argmax().item() == i for row in logits) / 9
        mean = sum((row.exp() / row.exp().sum())[i].item() for row in logits) / 9
        total += 3 * share * mean
    assert imbalance(logits).item() == pytest.approx(total, abs=1e-6)


def test_experts_of_other_ranks_are_filled_up(model):
    modules = target_modules(model, "all-linear")
    experts = {
        str(rank): Expert(
            "tiny",
            {
                name: tiny.lora(rank, rank=rank, d_out=shape[0], d_in=shape[1])
                for name, shape in {
                    n: (m.weight.shape if isinstance(m, nn.Linear) else m.weight.T.shape)
                    for n, m in modules.items()
                }.items()
            },
        )
        for rank in (1, 3)
    }
    learner = TaskSkills(
        modules, OPTIONS, tasks=1, heads=1, skills=2, experts=experts, trained=False
    )
    assert [group["speed"] for group in learner.groups()] == [1.0]
    assert len(learner.parameters()) == len(modules)
    for i, expert in enumerate(experts.values()):
        for name, delta in learner.experts(torch.float32)[i].items():
            torch.testing.assert_close(delta.dense(), expert.deltas[name].dense())


def test_what_skills_cannot_be(model):
    modules = target_modules(model, "all-linear")
    with pytest.raises(UsageError, match="skills is 1 or more"):
        TaskSkills(modules, OPTIONS, tasks=1, heads=1, skills=0)
    with pytest.raises(UsageError, match="heads do not cut"):
        TaskSkills(modules, OPTIONS, tasks=1, heads=5, skills=2)
    name, module = next(iter(modules.items()))
    d_out, d_in = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
    sparse = Expert("tiny", {name: tiny.sparse(d_out=d_out, d_in=d_in)})
    with pytest.raises(UsageError, match="has a sparse update there"):
        TaskSkills({name: module}, OPTIONS, tasks=1, heads=1, skills=1, experts={"s": sparse})
    small = Expert("tiny", {name: tiny.lora(d_out=d_out, d_in=d_in + 1)})
    with pytest.raises(BaseMismatchError):
        TaskSkills({name: module}, OPTIONS, tasks=1, heads=1, skills=1, experts={"s": small})
