"""Each path of the fused forward at one module, beside the module's own product."""

from typing import Any

import torch
from routing_floor import Speed
from routing_sides import Setting, in_turn, quartiles
from torch.nn.functional import linear

from adaptlib.routing.bank import LoRAStack
from adaptlib.routing.router import Choice

PATHS = ("dense", "in_place", "gather", "shared", "grouped")


class _Call:
    def __init__(self, call: Any) -> None:
        self.run = call

    def ready(self) -> None:
        pass


def paths(
    setting: Setting, experts: tuple[int, ...], toks: tuple[int, ...], rounds: int, rate: Speed
) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of a table, and its figures. Each token has `top_k` experts drawn alike, and `shared`
    one draw for all of them; at the wider of the two shapes of modules, d_in to d_out."""
    d_out, d_in = setting.inner, setting.width
    weight = torch.randn(d_out, d_in, dtype=setting.dtype, device=setting.device)
    generator = torch.Generator(setting.device).manual_seed(0)
    largest = [setting.delta(generator, d_out, d_in) for _ in range(max(experts))]
    lines = [
        f"{'experts':>7} {'tokens':>6} {'W x':>8} {'floor':>8}"
        + "".join(f" {path:>9}" for path in PATHS)
        + "   taken"
    ]
    rows: list[dict[str, Any]] = []
    for count in experts:
        deltas = dict(enumerate(largest[:count]))
        stack = LoRAStack.of(
            deltas, experts=count, dtype=setting.dtype, device=torch.device(setting.device)
        )
        k = min(setting.top_k, count)
        for tok in toks:
            x = torch.randn(tok, d_in, dtype=setting.dtype, device=setting.device)
            index = torch.rand(tok, count, device=setting.device).topk(k).indices
            choice = Choice(index, torch.full((tok, k), 1 / k, device=setting.device))
            one = Choice(choice.index[:1], choice.weight[:1])
            calls: dict[str, Any] = {"W x": _Call(lambda x=x: linear(x, weight))}
            for path in PATHS:
                given = (x[None], one) if path == "shared" else (x, choice)
                method = getattr(stack, path)
                call = _Call(lambda f=method, g=given: f(*g, "outputs"))
                if _copied(setting, path, tok, k, d_in + d_out) < 4e9 and _works(call):
                    calls[path] = call
            times = {p: quartiles(t) for p, t in in_turn(calls, rounds).items()}
            adds = tok * k * setting.rank * (d_in + d_out)
            touched = count * (1 - (1 - k / count) ** tok)
            size = touched * setting.rank * (d_in + d_out) * setting.dtype.itemsize
            least = max(adds / rate.product, size / rate.memory)
            taken = stack.path(tok, k)
            cells = (f"{1e3 * times[p][1]:9.3f}" if p in times else f"{'-':>9}" for p in PATHS)
            lines.append(
                f"{count:7,} {tok:6,} {1e3 * times['W x'][1]:8.3f} {1e3 * least:8.3f} "
                f"{' '.join(cells)}   {taken}"
            )
            rows.append(
                {"experts": count, "tok": tok, "floor": least, "taken": taken, "seconds": times}
            )
    return lines, rows


def _copied(setting: Setting, path: str, tok: int, k: int, sides: int) -> float:
    """Bytes of the rows that a path copies."""
    return tok * k * setting.rank * sides * setting.dtype.itemsize if path == "gather" else 0


def _works(call: _Call) -> bool:
    try:
        call.run()
    except (NotImplementedError, RuntimeError):  # torch has no such product here
        return False
    return True
