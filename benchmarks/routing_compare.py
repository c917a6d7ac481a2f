"""All sides of benchmarks/routing.py in turn: a prompt, a token, and growth with tokens and experts."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routing_floor import Speed, floor
from routing_plots import slope
from routing_sides import (
    Decode,
    Prefill,
    Setting,
    Side,
    first,
    fused,
    in_turn,
    merged,
    peft_arrow,
    peft_lora,
    quartiles,
    ratio,
    write_adapters,
)

import adaptlib

# The most that a pass may take, in passes of the base, by the number of experts.
TARGETS = {"prefill": {64: 1.7, 256: 2.5}, "decode": {64: 1.3, 256: 1.5}}
PEFT_TARGET = 8.0
STEPS = 10  # rounds of decoding for one of prefill: a step is short
PEFT_MOST = 256  # tokens: PEFT makes a tensor of (tokens, experts, d_out)


@dataclass(frozen=True)
class Plan:
    """How much of it to run. `many` is attached at rank 1, the others at the setting's."""

    setting: Setting = field(default_factory=Setting)
    rounds: int = 9
    prompt: int = 128
    experts: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    many: tuple[int, ...] = (10_000,)
    peft: tuple[int, ...] = (4, 16, 64)
    compared: tuple[int, ...] = (64, 256)  # against the number of tokens
    toks: tuple[int, ...] = (1, 4, 16, 64, 128, 256, 1024, 4096)
    library: int = 64
    processes: int = 7
    path_experts: tuple[int, ...] = (16, 64, 256, 1024)
    path_toks: tuple[int, ...] = (1, 16, 128, 1024)
    synthetic: bool = True


QUICK = Plan(
    rounds=2,
    experts=(4, 64),
    many=(),
    peft=(4,),
    compared=(64,),
    toks=(1, 16),
    library=4,
    processes=1,
    path_experts=(16,),
    path_toks=(1, 16),
    synthetic=False,
)


@dataclass
class Report:
    """What is printed, and the raw figures."""

    figures: dict[str, Any] = field(default_factory=dict)

    def say(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)

    def head(self, text: str) -> None:
        self.say("", f"## {text}")

    def promise(self, text: str, met: bool) -> None:
        self.say(f"{text}: {'met' if met else 'NOT met'}")


# -- the sides -------------------------------------------------------------------------------------


def make_sides(plan: Plan, scratch: Path, report: Report) -> dict[str, Side]:
    """By name, the base first. Largest first, and fewer and fewer experts are held."""
    setting = plan.setting
    base = setting.model()
    made: list[Side] = []
    counts = [c for c in sorted(plan.experts, reverse=True) if _room(setting, c, report)]
    experts = setting.experts(max(counts))
    router = adaptlib.Arrow.fit(experts, top_k=setting.top_k)
    for count in counts:
        for name in list(experts)[count:]:
            del experts[name]
        router = first(router, count)
        made.append(fused(base, experts, router))
    del experts, router
    few = setting.experts(max(plan.peft, default=1))  # seeded one by one: the same as the first
    paths, single = write_adapters(few, scratch), few["e0"]
    del few
    for count in plan.many:
        thin = replace(setting, rank=1)
        if _room(thin, count, report):
            held = thin.experts(count)
            fitted = adaptlib.Arrow.fit(held, top_k=setting.top_k)
            made.append(fused(base, held, fitted, f"adaptlib, {count:,} rank 1"))
            del held, fitted
    sides = [
        Side("base", base),
        merged(setting, single),
        peft_lora(base, paths[0]),
        *sorted(made, key=lambda side: side.experts),
        *(peft_arrow(base, paths[:count], setting.top_k) for count in plan.peft),
    ]
    return {side.name: side for side in sides}


def _room(setting: Setting, count: int, report: Report) -> bool:
    """Whether the experts, and their stack beside them, fit in what memory is free."""
    need = 2 * count * (setting.expert_bytes + setting.prototype_bytes) + 1e9
    text = Path("/proc/meminfo").read_text()
    free = 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    if need <= free:
        return True
    report.say(
        f"{count:,} experts of rank {setting.rank} were not attached: with what is stacked they "
        f"need {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    )
    return False


def rank_of(plan: Plan, side: Side) -> int:
    return 1 if side.experts in plan.many else plan.setting.rank


# -- a prompt and a token --------------------------------------------------------------------------


def compare(plan: Plan, sides: Mapping[str, Side], rate: Speed, report: Report) -> None:
    """Prefill and decoding, all sides in turn."""
    ids, kinds = plan.setting.ids(plan.prompt), {"prefill": Prefill, "decode": Decode}
    for what, kind in kinds.items():
        tok, context = (plan.prompt, 0) if what == "prefill" else (1, plan.prompt)
        calls = {name: kind(side, ids) for name, side in sides.items()}
        rounds = plan.rounds if what == "prefill" else STEPS * plan.rounds
        times = in_turn(calls, rounds)
        after = f" after {context}" if context else ""
        report.head(f"{what} of {tok} token{'s'[: tok > 1]}{after}, {rounds} rounds in turn")
        report.say(*table(plan, what, tok, context, sides, times, rate))
        report.figures[what] = {
            name: {"experts": sides[name].experts, "seconds": seconds}
            for name, seconds in times.items()
        }
        for count in plan.peft if what == "prefill" else ():
            mine, theirs = f"adaptlib, {count} experts", f"PEFT Arrow, {count} experts"
            if mine in times:
                speedup = ratio(times[theirs], times[mine])
                said = f"{mine}: {speedup:.1f} x as fast as PEFT's Arrow"
                if count == 64:
                    report.promise(f"{said}, wanted {PEFT_TARGET:g}", speedup >= PEFT_TARGET)
                else:
                    report.say(said)


def table(
    plan: Plan,
    what: str,
    tok: int,
    context: int,
    sides: Mapping[str, Side],
    times: Mapping[str, list[float]],
    rate: Speed,
) -> list[str]:
    bare = floor(plan.setting, 0, tok, context=context)
    lines = [
        f"multiply-adds a token without experts {bare.base / 1e6:.2f} M; logits and chosen experts in M",
        f"{'':25}{'ms':>8}{'quartiles':>14}{'x base':>7}{'target':>11}{'logits':>7}{'chosen':>7}"
        f"{'MB':>7}{'floor':>8}{'x':>6}",
    ]
    for name, side in sides.items():
        low, middle, high = (1e3 * value for value in quartiles(times[name]))
        least = floor(
            plan.setting, side.experts, tok, context=context, rank=rank_of(plan, side)
        ) if "merged" not in name else bare  # fmt: skip
        over = ratio(times[name], times["base"])
        target = ""
        if name.startswith("adaptlib") and side.experts in TARGETS[what]:
            limit = TARGETS[what][side.experts]
            target = f"<={limit:g} {'met' if over <= limit else 'NOT'}"
        lines.append(
            f"{name:25}{middle:8.2f}{f'{low:.1f}-{high:.1f}':>14}{over:7.2f}{target:>11}"
            f"{least.logits / 1e6:7.2f}{least.chosen / 1e6:7.2f}{least.bytes / 1e6:7.0f}"
            f"{1e3 * least.seconds(rate):8.2f}{least.seconds(rate) / bare.seconds(rate):6.2f}"
        )
    return lines


# -- growth ---------------------------------------------------------------------------


def against_tokens(plan: Plan, sides: Mapping[str, Side], rate: Speed, report: Report) -> None:
    counts = {f"adaptlib, {count:,} experts" for count in plan.compared}
    theirs = f"PEFT Arrow, {max(plan.peft)} experts" if plan.peft else ""
    chosen = {name: side for name, side in sides.items() if name in counts | {"base", theirs}}
    times: dict[str, dict[int, list[float]]] = {name: {} for name in chosen}
    for tok in plan.toks:
        ids = plan.setting.ids(tok)
        here = {n: s for n, s in chosen.items() if n != theirs or tok <= PEFT_MOST}
        calls = {name: Prefill(side, ids) for name, side in here.items()}
        for name, seconds in in_turn(calls, plan.rounds, warm=1).items():
            times[name][tok] = seconds
    report.head(f"ms of a prefill against its tokens, medians of {plan.rounds} in turn")
    report.say(f"{'':25}" + "".join(f"{tok:8,}" for tok in plan.toks) + f"{'slope':>7}")
    for name, row in times.items():
        medians = {tok: statistics.median(row[tok]) for tok in row}
        cells = (f"{1e3 * medians[t]:8.1f}" if t in medians else f"{'-':>8}" for t in plan.toks)
        report.say(f"{name:25}{''.join(cells)}{slope(medians, least=16):>7}")
        if name != theirs:
            least = {t: floor(plan.setting, sides[name].experts, t).seconds(rate) for t in row}
            cells = (f"{1e3 * least[tok]:8.1f}" for tok in plan.toks)
            report.say(f"{'  its floor':25}{''.join(cells)}{slope(least, least=16):>7}")
    report.say("slope: of log time over log tokens, least squares, from 16 tokens")
    report.figures["tokens"] = times


def against_experts(plan: Plan, sides: Mapping[str, Side], report: Report) -> None:
    """The slopes of what `compare` measured."""
    report.head("growth with the number of experts: slope of log time over log experts")
    for what in ("prefill", "decode"):
        rows = report.figures[what]
        base = statistics.median(rows["base"]["seconds"])
        ours = {
            side.experts: statistics.median(rows[name]["seconds"])
            for name, side in sides.items()
            if name.startswith("adaptlib") and side.experts not in plan.many
        }
        theirs = {
            side.experts: statistics.median(rows[name]["seconds"])
            for name, side in sides.items()
            if name.startswith("PEFT Arrow")
        }
        added = {count: value - base for count, value in ours.items() if value > base}
        report.say(
            f"{what:8} adaptlib {slope(ours)}, from 64 {slope(ours, least=64)}; what is "
            f"added to the base {slope(added)}, from 64 {slope(added, least=64)}; "
            f"PEFT {slope(theirs)}"
        )


def floors(plan: Plan, rate: Speed) -> dict[str, dict[int, float]]:
    """Seconds by number of experts, for the plot."""
    shapes = {"prefill": (plan.prompt, 0), "decode": (1, plan.prompt)}
    return {
        what: {
            count: floor(plan.setting, count, tok, context=context).seconds(rate)
            for count in plan.experts
        }
        for what, (tok, context) in shapes.items()
    }
