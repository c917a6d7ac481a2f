"""The GPU part of benchmarks/routing.py: a base of the shape of Llama 7B in bfloat16, random weights."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from routing_floor import floor, speed
from routing_sides import (
    Decode,
    Prefill,
    Setting,
    Side,
    fused,
    in_turn,
    peft_arrow,
    quartiles,
    ratio,
    write_adapters,
)

import adaptlib

SEVEN = Setting(
    width=4096,
    inner=11008,
    layers=32,
    heads=32,
    vocab=32000,
    rank=16,
    dtype=torch.bfloat16,
    device="cuda",
)
EXPERTS, ROWS, PROMPT = 64, 8, 512


def cuda(report: Any, rounds: int, setting: Setting = SEVEN) -> None:
    """Base, adaptlib and PEFT in turn; a side that memory does not hold is said and left out."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        report.say("not run: torch sees no GPU here")
        return
    with torch.inference_mode():
        rate, base = speed(setting), setting.model()
        experts = setting.experts(EXPERTS)
        sides = [Side("base", base)]
        sides.append(fused(base, experts, adaptlib.Arrow.fit(experts, top_k=setting.top_k)))
        with tempfile.TemporaryDirectory() as scratch:
            paths = write_adapters(experts, Path(scratch))
            del experts
            try:
                sides.append(peft_arrow(base, paths, setting.top_k))
            except torch.OutOfMemoryError:
                report.say("PEFT Arrow: out of memory")
        device = torch.cuda.get_device_name() if setting.device == "cuda" else setting.device
        report.say(f"{device}, torch {torch.__version__}, {setting.dtype}, batch {ROWS}")
        ids = setting.ids(PROMPT, ROWS)
        for what, kind in (("prefill", Prefill), ("decode", Decode)):
            calls: dict[str, Any] = {}
            for side in sides:
                try:
                    calls[side.name] = kind(side, ids)
                    calls[side.name].run()
                except torch.OutOfMemoryError:
                    calls.pop(side.name, None)
                    report.say(f"{side.name}, {what}: out of memory")
            times = in_turn(calls, rounds, sync=_sync)
            report.head(f"{what}, {ROWS} x {PROMPT if what == 'prefill' else 1}, {rounds} rounds")
            report.say(f"{'':25}{'ms':>8}{'x base':>8}{'floor ms':>10}")
            tok, context = (PROMPT, 0) if what == "prefill" else (1, PROMPT)
            for side in (side for side in sides if side.name in times):
                # the rows of a batch share the weights and nothing else
                least = floor(setting, side.experts, tok, context=context)
                seconds = max(ROWS * tok * least.adds / rate.product, least.bytes / rate.memory)
                report.say(
                    f"{side.name:25}{1e3 * quartiles(times[side.name])[1]:8.2f}"
                    f"{ratio(times[side.name], times['base']):8.2f}{1e3 * seconds:10.2f}"
                )
            report.figures[f"cuda {what}"] = times


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
