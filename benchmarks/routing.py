"""What routing among many experts costs: beside the base, one LoRA, and PEFT's Arrow, in one run.

    python benchmarks/routing.py [--quick] [--json FILE] [--images DIR] [--rounds 9] [--most N]
    python benchmarks/routing.py --cuda        a 7B-shaped base on a GPU, instead

A Llama of width 512 and 6 layers, float32, random weights; rank 8 on all seven projections, top 4.
All sides are in one process and take turns within a round, after rounds that do not count;
figures are medians over rounds with the quartiles, and ratios medians of each round's ratio. Beside
each stands its floor (routing_floor.py). Attaching and memory are measured in processes of their own
(routing_fresh.py). The weights of the base are in memory once, for all sides but the merged one.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import synthetic
import torch
from routing_compare import (
    QUICK,
    Plan,
    Report,
    against_experts,
    against_tokens,
    compare,
    floors,
    make_sides,
)
from routing_floor import speed
from routing_fresh import forget, fresh
from routing_paths import paths
from routing_plots import plot_experts, plot_tokens

import adaptlib

ATTACH_TARGET, ACTIVATIONS = 1.0, 1.3  # seconds; activations of a pass of the base


# -- attaching -------------------------------------------------------------------------------------


def attaching(plan: Plan, scratch: Path, threads: int, report: Report) -> None:
    count, where = plan.library, scratch / "library"
    library = adaptlib.Library.open(where, create=True)
    for name, expert in plan.setting.experts(count).items():
        library.add(expert, name)
    report.head(f"attaching {count} experts from a library, {plan.processes} processes each")
    report.say(
        "in processes of their own that have imported everything and run the base once;",
        "warm: the library's files are in the system's page cache; cold: they were dropped from it",
        f"{'s':6}{'read':>8}{'fit':>8}{'attach':>8}{'all':>8}{'first pass':>12}",
    )
    found: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}
    for _ in range(plan.processes):
        for state, runs in found.items():
            if state == "cold":
                forget(where)
            runs.append(fresh("attach", where, plan.prompt, threads, plan.setting))
    for state, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        report.say(
            f"{state:6}{middle['read']:8.3f}{middle['fit']:8.3f}{middle['attach']:8.3f}"
            f"{middle['all']:8.3f}{middle['first pass']:12.3f}"
        )
        if state == "warm" and count == 64:
            said = f"attach of {count}: {middle['all']:.2f} s, wanted {ATTACH_TARGET:g}"
            report.promise(said, middle["all"] <= ATTACH_TARGET)
    report.figures["attach"] = found
    memory(plan, where, threads, report)


def memory(plan: Plan, where: Path, threads: int, report: Report) -> None:
    report.head("anonymous memory of attaching and of a pass, MB above the loaded base")
    report.say(
        "allowed: the experts' bytes and 1.3 times what a pass of the base takes; kept: experts and",
        "prototypes, which are the router's, after attaching; peak: the highest from first to last",
        f"{'tokens':>6}{'pass of base':>14}{'routed':>8}{'x':>6}{'experts':>9}{'prototypes':>12}"
        f"{'attaching':>11}{'kept':>7}{'peak':>7}{'allowed':>9}",
    )
    prototypes = plan.library * plan.setting.prototype_bytes
    report.figures["memory"] = {}
    for tok in (plan.prompt, 8 * plan.prompt):
        runs = [
            fresh("memory", where, tok, threads, plan.setting)
            for _ in range(min(3, plan.processes))
        ]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        base, held = middle["base"], middle["experts"]
        peak, allowed = max(middle["attaching"], middle["passes"]), held + ACTIVATIONS * base
        routed = statistics.median(run["passes"] - run["kept"] for run in runs)
        attaching, kept = (middle[key] / 1e6 for key in ("attaching", "kept"))
        report.say(
            f"{tok:6,}{base / 1e6:14.1f}{routed / 1e6:8.1f}{routed / base:6.2f}{held / 1e6:9.1f}"
            f"{prototypes / 1e6:12.1f}{attaching:11.1f}{kept:7.1f}{peak / 1e6:7.1f}"
            f"{allowed / 1e6:9.1f}"
        )
        report.promise(f"peak of {tok:,} tokens", peak <= allowed)
        report.promise("  with the prototypes allowed too", peak <= allowed + prototypes)
        report.figures["memory"][tok] = runs


# -- all of it -------------------------------------------------------------------------------------


def run(plan: Plan, report: Report, *, threads: int = 2, images: Path | None = None) -> None:
    torch.set_num_threads(threads)
    scratch = Path(tempfile.mkdtemp(prefix="adaptlib-routing-"))
    try:
        with torch.inference_mode():
            _run(plan, report, threads, images, scratch)
    finally:
        shutil.rmtree(scratch)


def _run(plan: Plan, report: Report, threads: int, images: Path | None, scratch: Path) -> None:
    setting = plan.setting
    rate = speed(setting)
    report.figures["speed"] = {"multiply-adds": rate.product, "bytes": rate.memory}
    report.say(
        f"Llama, width {setting.width}, {setting.layers} layers, float32; rank {setting.rank} on all "
        f"seven projections, top {setting.top_k}; {threads} threads",
        f"Python {platform.python_version()}, torch {torch.__version__}; a plain matrix product "
        f"{rate.product / 1e9:.0f} G multiply-adds/s,",
        f"memory {rate.memory / 1e9:.1f} GB/s (best of copy and matrix times vector): floors are at "
        "these speeds",
        f"an expert {setting.expert_bytes / 1e6:.2f} MB and its prototypes "
        f"{setting.prototype_bytes / 1e6:.2f} MB",
    )
    sides = make_sides(plan, scratch / "adapters", report)
    compare(plan, sides, rate, report)
    against_experts(plan, sides, report)
    against_tokens(plan, sides, rate, report)
    report.head("putting on, once, s: from memory for adaptlib; from disk and one token for PEFT")
    report.say(*(f"{s.name:25}{s.attach:8.2f}" for s in sides.values() if s.attach))
    report.figures["put on"] = {side.name: side.attach for side in sides.values()}
    if images:
        least = floors(plan, rate)
        plot_experts(report.figures, least, images / "routing-experts.svg")
        plot_tokens(report.figures, images / "routing-tokens.svg")
        report.say("", "wrote routing-experts.svg and routing-tokens.svg")
    sides.clear()
    if plan.processes:
        attaching(plan, scratch, threads, report)
    report.head(f"each path of the fused forward, ms, {setting.width} to {setting.inner}")
    lines, report.figures["paths"] = paths(
        setting, plan.path_experts, plan.path_toks, plan.rounds, rate
    )
    report.say(*lines)
    if plan.synthetic:
        shortlist(report)


def shortlist(report: Report) -> None:
    report.head("10,000 experts with a shortlist (benchmarks/synthetic.py)")
    found = report.figures["synthetic"] = synthetic.measure()
    report.say(*synthetic.report(found))
    times = found["times"]
    main = next(row for row in found["recall"] if row["level"] == synthetic.MAIN)
    report.promise(
        f"the shortlist holds {main['shortlist']:.3f} of Arrow's weight, wanted 0.95",
        main["shortlist"] >= 0.95,
    )
    report.promise(
        f"beyond the base's pass {times['ratio']:.2f} of it, wanted 0.5", times["ratio"] <= 0.5
    )
    report.promise(
        f"peak memory {times['peak_mb']:,.0f} MB, wanted 2,000", times["peak_mb"] <= 2000
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, few sizes, no image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--images", type=Path, metavar="DIR", help="write the plots there")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--most", type=int, metavar="N", help="attach no more experts than N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cuda", action="store_true", help="the GPU part, and nothing else")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    report = Report()
    if options.images:
        options.images.mkdir(parents=True, exist_ok=True)
    try:
        _measure(options, report)
    finally:  # what was measured is kept where a later part fails
        if options.json:
            options.json.write_text(json.dumps(report.figures, indent=1) + "\n")


def _measure(options: argparse.Namespace, report: Report) -> None:
    if options.cuda:
        from routing_cuda import cuda

        cuda(report, options.rounds or 9)
        return
    plan = QUICK if options.quick else Plan()
    if options.rounds:
        plan = replace(plan, rounds=options.rounds)
    if options.most:
        sizes = {name: getattr(plan, name) for name in ("experts", "many")}
        kept = {n: tuple(c for c in cs if c <= options.most) for n, cs in sizes.items()}
        plan = replace(plan, **kept)
    run(plan, report, threads=options.threads, images=options.images)
    report.head("GPU (--cuda)")
    report.say("not run")


if __name__ == "__main__":
    main()
