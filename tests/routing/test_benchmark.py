"""The benchmark of routing runs in a tiny setting, and its floors are sums over modules."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings(  # PEFT's own, in how it calls transformers
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
TINY = {"width": 16, "inner": 24, "layers": 2, "heads": 2, "vocab": 32, "rank": 4, "top_k": 2}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


def test_all_of_it_runs(benchmark, threads, tmp_path, capsys):
    routing, compare = benchmark("routing"), benchmark("routing_compare")
    report = compare.Report()
    plan = compare.Plan(
        setting=benchmark("routing_sides").Setting(**TINY),
        rounds=1,
        prompt=4,
        experts=(1, 3),
        many=(5,),
        peft=(3,),
        compared=(3,),
        toks=(1, 16, 20),
        library=2,
        processes=0,
        path_experts=(3,),
        path_toks=(2,),
        synthetic=False,
    )
    routing.run(plan, report, threads=threads, images=tmp_path)
    printed = capsys.readouterr().out
    print(printed)
    assert max(map(len, printed.splitlines())) <= 100
    figures = json.loads(json.dumps(report.figures))
    names = {"base", "one LoRA, merged into W", "one LoRA beside W (PEFT)"}
    names |= {"adaptlib, 1 experts", "adaptlib, 3 experts", "adaptlib, 5 rank 1"}
    assert (
        figures["prefill"].keys() == figures["decode"].keys() == names | {"PEFT Arrow, 3 experts"}
    )
    assert figures["paths"][0]["seconds"].keys() >= {"dense", "in_place", "gather", "shared"}
    assert all((tmp_path / f"routing-{what}.svg").stat().st_size for what in ("experts", "tokens"))


def test_the_part_in_fresh_processes_runs_here(benchmark, tmp_path):
    """The measures that the processes take, in this one."""
    fresh, sides = benchmark("routing_fresh"), benchmark("routing_sides")
    setting = sides.Setting(**TINY)
    library = benchmark("adaptlib").Library.open(tmp_path / "library", create=True)
    for name, expert in setting.experts(2).items():
        library.add(expert, name)
    fresh.forget(tmp_path / "library")
    with torch.inference_mode():
        times = fresh.attach(str(tmp_path / "library"), 4, setting)
        sizes = fresh.memory(str(tmp_path / "library"), 4, setting)
    assert times["all"] == pytest.approx(times["read"] + times["fit"] + times["attach"])
    assert sizes["experts"] == 2 * setting.expert_bytes
    assert sizes["passes"] >= sizes["kept"]


def test_without_a_gpu_its_part_says_so(benchmark, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    benchmark("routing").main(["--cuda"])
    assert "not run" in capsys.readouterr().out


def test_the_part_for_a_gpu_runs_on_a_cpu(benchmark, monkeypatch, capsys):
    module, report = benchmark("routing_cuda"), benchmark("routing_compare").Report()
    for name, size in {"EXPERTS": 3, "ROWS": 2, "PROMPT": 6}.items():
        monkeypatch.setattr(module, name, size)
    setting = benchmark("routing_sides").Setting(**TINY, dtype=torch.bfloat16)
    module.cuda(report, 1, setting)
    assert report.figures["cuda prefill"].keys() == report.figures["cuda decode"].keys()
    assert len(report.figures["cuda decode"]) == 3, capsys.readouterr().out


@pytest.mark.parametrize(
    ("experts", "tok", "context"), [(0, 1, 5), (1, 3, 0), (6, 4, 0), (6, 1, 9)]
)
def test_the_floor_is_the_sum_over_modules(benchmark, experts, tok, context):
    setting = benchmark("routing_sides").Setting(**TINY)
    found = benchmark("routing_floor").floor(setting, experts, tok, context=context)
    model, expert = setting.model(), setting.expert(0)
    k = min(setting.top_k, experts)
    base = logits = chosen = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            base += tok * module.weight.numel()
            if name in expert.deltas:
                delta = expert.deltas[name]
                logits += tok * experts * delta.shape[1] if experts > 1 else 0
                chosen += tok * k * (delta.a.numel() + delta.b.numel())
    attended = sum(context + i + 1 for i in range(tok))
    base += attended * 2 * setting.layers * setting.width  # scores, and their mean of values
    assert tok * found.base == pytest.approx(base)
    assert tok * found.logits == logits
    assert tok * found.chosen == chosen
    assert setting.expert_bytes == 4 * expert.params
