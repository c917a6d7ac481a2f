"""`adapter_config.json`: what PEFT says about an adapter, parsed as hostile input, and written.

Only the fields named in `LoRAConfig` and `SHiRAConfig` are used. All others are kept as they are,
and nothing is imported, fetched or opened because of them. What an expert cannot hold is refused.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from adaptlib.errors import CorruptError, NotFoundError, RefusedError
from adaptlib.experts.codec import MAX_BASE, Module
from adaptlib.experts.tensors import MAX_SIDE, brief, open_regular, parse_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 1 << 20  # bytes; PEFT writes about 1 kB
MAX_PATTERN = 512  # characters
MAX_STEPS = 20_000_000  # of matching, an upper bound for all patterns on all modules; a second
_COMPILE, _MATCH = 4000, 20  # what compiling a pattern, and trying it on a name, cost in steps
MASK = "adaptlib"  # `mask_type` of what we export: values of 0 there are padding

# What ΔW = scale · B A, or a few entries of ΔW, cannot say. Each is a field that is else empty.
_CANNOT = {
    "use_dora": "DoRA also rescales the base weight, so its update is no ΔW of its own",
    "use_qalora": "QA-LoRA pools the input of lora_A in groups",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "it is PEFT's router, which holds no update; adaptlib routes by itself",
    "velora_config": "VeLoRA keeps more than lora_A and lora_B",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA changes the base weight and keeps a diagonal between its factors",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter",
    "target_parameters": "it adapts parameters of mixture-of-experts blocks, whose layout in the "
    "file depends on the version of PEFT",
    "layer_replication": "it needs a base model with repeated layers",
    "lora_bias": "lora_B has a bias",
}
# Initialisations for which PEFT changes the base weight, mostly at each load again.
_MUTATES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

V = TypeVar("V", int, float)


class LoRAConfig(msgspec.Struct, frozen=True):
    """The fields of PEFT's LoraConfig that decide ΔW."""

    r: Annotated[int, msgspec.Meta(le=MAX_SIDE)]
    lora_alpha: float
    use_rslora: bool | None = False
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(le=MAX_SIDE)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    bias: str | None = "none"
    base_model_name_or_path: str | None = None
    revision: str | None = None


class SHiRAConfig(msgspec.Struct, frozen=True):
    """The fields of PEFT's ShiraConfig that decide ΔW. Each module keeps r·(d_in + d_out)
    entries."""

    r: Annotated[int, msgspec.Meta(le=MAX_SIDE)]
    mask_type: str | None = "random"
    base_model_name_or_path: str | None = None
    revision: str | None = None


class _Kind(msgspec.Struct):
    peft_type: str


def read_config(path: Path) -> dict[str, Any]:
    """The document in an adapter_config.json, as it is. Raises NotFoundError, RefusedError (too
    large, a key twice) and CorruptError (not a JSON object)."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_CONFIG + 1)
    except NotFoundError:
        raise NotFoundError(
            f"{path.parent} has no {CONFIG_NAME}; a PEFT directory holds {CONFIG_NAME} and "
            "adapter_model.safetensors",
            hint="give the directory that save_pretrained wrote",
        ) from None
    return parse_document(str(path), text)


def parse_document(source: str, text: bytes) -> dict[str, Any]:
    """The document in the text of an adapter_config.json; raises as `read_config` does."""
    if len(text) > MAX_CONFIG:
        raise RefusedError(f"{source} has over {MAX_CONFIG:,} bytes; at most that many are read")
    document = parse_json(source, text)
    if not isinstance(document, dict):
        raise CorruptError(f"{source} holds a {type(document).__name__}, want an object")
    # It will be kept in a manifest: numbers and strings that would change there are refused.
    try:
        kept = msgspec.json.decode(msgspec.json.encode(document))
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        kept = None
    if kept != document:
        raise RefusedError(f"{source} holds a number or a string that JSON cannot carry exactly")
    return document


def parse_config(source: str, document: Mapping[str, Any]) -> LoRAConfig | SHiRAConfig:
    """The fields that matter, or the reason why this adapter cannot be an expert.

    `source` names the file in errors. Raises CorruptError, naming the field, for a wrong type or an
    impossible value, and RefusedError for what an expert cannot hold.
    """
    kind = _convert(source, document, _Kind).peft_type
    wanted = {"LORA": LoRAConfig, "SHIRA": SHiRAConfig}.get(kind)
    if wanted is None:
        raise RefusedError(
            f"{source} is an adapter of peft_type {kind[:40]!r}; LORA and SHIRA can be read",
            hint="PEFT's save_as_lora turns some other adapters into LoRA",
        )
    for field, why in _CANNOT.items():
        if document.get(field) not in (None, False, [], {}):
            raise RefusedError(f"{source} sets {field}: {why}; it cannot be kept as an expert")
    config = _convert(source, document, wanted)
    if config.r < 1:
        raise CorruptError(f"{source}: r is {config.r}; a rank is 1 or more")
    for field in ("base_model_name_or_path", "revision"):
        text = getattr(config, field)
        if text and (len(text) > MAX_BASE or not text.isprintable()):
            raise RefusedError(
                f"{source} has a {field} of {len(text):,} characters that is over {MAX_BASE} long "
                f"or not printable: {brief(text, 80)}"
            )
    if isinstance(config, LoRAConfig):
        _check_lora(source, config)
    return config


def _check_lora(source: str, config: LoRAConfig) -> None:
    if config.bias not in (None, "none"):
        raise RefusedError(
            f"{source} sets bias to {config.bias[:40]!r}: biases of the base model were trained "
            "beside the adapter; it cannot be kept as an expert"
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_MUTATES_BASE):
        raise RefusedError(
            f"{source} sets init_lora_weights to {init[:40]!r}: PEFT changes the base weights for "
            "this, so B A is not its update of the base model",
            hint="save it again: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for name, rank in (config.rank_pattern or {}).items():
        if rank < 1:
            raise CorruptError(f"{source}: rank_pattern[{name[:80]!r}] is {rank}; want 1 or more")
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{k[:80]!r}]": v for k, v in (config.alpha_pattern or {}).items()}
    for name, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise CorruptError(f"{source}: {name} is {alpha}; want a finite number")


def _convert(source: str, document: Mapping[str, Any], wanted: type[Any]) -> Any:
    try:
        return msgspec.convert(document, wanted)
    except (msgspec.ValidationError, OverflowError) as error:
        raise CorruptError(f"{source}: {str(error)[:200]}") from None


def scales(
    source: str, config: LoRAConfig, modules: Mapping[str, Any]
) -> dict[str, tuple[int, float]]:
    """(rank, scale) of each module: alpha/r, or alpha/√r for rsLoRA, after the patterns."""
    ranks = _match(source, "rank_pattern", config.rank_pattern or {}, modules)
    alphas = _match(source, "alpha_pattern", config.alpha_pattern or {}, modules)
    found: dict[str, tuple[int, float]] = {}
    for module in modules:
        rank = ranks.get(module, config.r)
        alpha = alphas.get(module, config.lora_alpha)
        found[module] = rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return found


def _match(
    source: str, field: str, patterns: Mapping[str, V], modules: Mapping[str, Any]
) -> dict[str, V]:
    """The value for each module that a pattern matches: PEFT's rule (`get_pattern_key`), which is
    the first key that matches as a regular expression the whole name or its end after a dot."""
    names: dict[str, tuple[int, V]] = {}  # keys that are a name as a whole
    others: list[tuple[int, str, V]] = []
    for place, (key, value) in enumerate(patterns.items()):
        if len(key) <= MAX_PATTERN and _NAME.fullmatch(key):
            names.setdefault(re.sub(r"\\(.)", r"\1", key), (place, value))
        else:
            others.append((place, key, value))
    _check_cost(source, field, [key for _, key, _ in others], modules)
    compiled = [(place, _compile(source, field, key), value) for place, key, value in others]
    found: dict[str, V] = {}
    for module in modules:
        hits = [names[name] for name in _ends(module) if name in names]
        first = min((place for place, _ in hits), default=len(patterns))
        for place, pattern, value in compiled:
            if place > first:
                break
            if pattern.match(module):
                hits.append((place, value))
                break
        if hits:
            found[module] = min(hits, key=lambda hit: hit[0])[1]
    return found


# A key that matches one text only, `^` for the whole name: what adaptlib writes for each module.
_NAME = re.compile(r"\^?(?:[^\\.^$*+?{}\[\]|()]|\\[^A-Za-z0-9^])+")
# The regular expressions that are tried at all: no backslash, class or group that costs more than
# it seems to. `(?i:[\0-\U0010ffff])` takes a second to compile.
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.^$*+?{},|()\[\]:-]|\\[^A-Za-z0-9]|\\[dDwWsS])*", re.ASCII)


def _ends(module: str) -> Iterator[str]:
    """What a key that is a name can be to match this module: its name, and its ends after dots."""
    yield f"^{module}"
    yield module
    for i, letter in enumerate(module):
        if letter == ".":
            yield module[i + 1 :]


def _compile(source: str, field: str, key: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `[[` may mean more one day
            return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CorruptError(
            f"{source}: {field} has the key {brief(key, 80)}, no regular expression: {error}"
        ) from None


def _check_cost(source: str, field: str, keys: Sequence[str], modules: Mapping[str, Any]) -> None:
    """RefusedError where matching could take more than a second. The keys come from outside:
    `(a+)+$` on a long name would not end."""
    longest = max(map(len, modules), default=0)
    places = sum(1 + name.count(".") for name in modules)
    once = len(modules) * _MATCH + sum(map(len, modules)) // 8
    steps = 0
    for key in keys:
        # A group that is repeated can be exponential.
        odd = not _PLAIN.fullmatch(key) or re.search(r"\)[*+{]|\(\?(?!:)", key)
        if not odd and len(key) <= MAX_PATTERN:
            steps += _COMPILE + 40 * len(key) + once + _ways(key, longest) * places
            if steps <= MAX_STEPS:
                continue
        raise RefusedError(
            f"{source}: {field} has a pattern that could take for ever to match: {brief(key, 80)}",
            hint="write module names out, or fewer *, + and groups",
        )


def _ways(pattern: str, length: int) -> int:
    """In how many ways a pattern without repeated groups can be tried at one place of a name: the
    product of its repeats and groups, the sum of alternatives."""
    sums, products = [0], [1]
    for token in re.findall(r"\\.|\[\^?\]?[^\]]*\]?|\(\?:|\)\?|.", pattern):
        if token.startswith("("):
            sums.append(0)
            products.append(1)
        elif token == "|":
            sums[-1] += products[-1]
            products[-1] = 1
        elif token.startswith(")") and len(sums) > 1:
            inner = sums.pop() + products.pop() + (token == ")?")
            products[-1] *= inner
        elif token in ("*", "+", "?", "{"):
            products[-1] *= length + 1 if token != "?" else 2
    while len(sums) > 1:
        inner = sums.pop() + products.pop()
        products[-1] *= inner
    return sums[0] + products[0]


def lora_config(
    modules: Mapping[str, Module], base: str, revision: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """A LoraConfig for these modules. The commonest rank and alpha are the defaults, the others
    patterns that match one name each."""
    ranks = {name: module.rank or 0 for name, module in modules.items()}
    alphas = {name: _alpha(module) for name, module in modules.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return _common("LORA", modules, base, revision, fan_in_fan_out) | {
        "alpha_pattern": {_exactly(n): _short(a) for n, a in alphas.items() if a != alpha},
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": _short(alpha),
        "lora_dropout": 0.0,
        "r": r,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r},
        "use_dora": False,
        "use_rslora": False,
    }


def shira_config(
    modules: Mapping[str, Module], base: str, revision: str | None, r: int
) -> dict[str, Any]:
    """A ShiraConfig for these modules. Its mask_type is none of PEFT's, so PEFT draws no random
    mask before it loads the positions."""
    return _common("SHIRA", modules, base, revision, False) | {
        "init_weights": True,
        "mask_type": MASK,
        "r": r,
        "random_seed": None,
    }


def _common(
    kind: str, modules: Mapping[str, Module], base: str, revision: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": kind,
        "revision": revision,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }


def inexact(modules: Mapping[str, Module]) -> list[str]:
    """The modules whose scale is alpha/r for no alpha."""
    return [name for name, m in modules.items() if m.rank and _alpha(m) / m.rank != m.scale]


def _alpha(module: Module) -> float:
    """The alpha for which alpha/r is the scale to the last bit, where there is one. Every scale
    from PEFT has one; for ranks that are no power of two some others have not, and the nearest is
    taken, which is off by one unit in the last place (1e-16)."""
    rank, scale = module.rank or 1, module.scale or 0.0
    product = scale * rank
    near = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), product)


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _short(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha
