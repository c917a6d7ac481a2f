"""The names of tensors in PEFT's files, over its versions and trainers.

base_model.model.<module>.lora_A.weight            what save_pretrained writes
base_model.model.<module>.lora_A.default.weight    with the adapter's name in it
<module>.lora_A.weight                             as some other trainers write it
"""

import re
from collections import Counter
from collections.abc import Mapping

from adaptlib.errors import CorruptError, RefusedError
from adaptlib.experts.tensors import RawTensor, brief, cut

PREFIX = "base_model.model."

_PARTS = {"lora": ("lora_A", "lora_B"), "sparse": ("shira_weight", "shira_indices")}
_KEY = re.compile(r"(.+)\.(lora_[AB]|shira_weight|shira_indices)((?:\.[^.]+){0,2})")
_MODULE = re.compile(r"[^\s/\\.]+(\.[^\s/\\.]+)*")  # a path in a model, never one in a file system
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _patterns(*reasons: tuple[str, str]) -> dict[re.Pattern[str], str]:
    return {re.compile(pattern): why for pattern, why in reasons}


# What else is found in adapter files; the first that fits the name says why it is refused. Those
# of _INSIDE may be in a name that looks like a part of an update.
_INSIDE = _patterns(
    (r"lora_magnitude_vector", "DoRA also rescales the base weight"),
    (r"lora_embedding_[AB]", "it adapts an embedding; experts adapt linear modules"),
    (r"\.experts(\.base_layer)*\.lora_", "it adapts mixture-of-experts parameters"),
    (r"\.bias$", "a bias was trained beside the adapter"),
    (r"modules_to_save|original_module", "a whole module was trained beside the adapter"),
    (r"trainable_tokens|token_adapter", "rows of the embedding were trained beside the adapter"),
    (r"prompt_embeddings|prompt_encoder", "it belongs to prompt tuning"),
    (r"ia3_l", "it belongs to IA3"),
)
_LEFT_OVER = _INSIDE | _patterns(
    (
        r"(embed\w*|wte|wpe|lm_head|embed_out)(\.base_layer)?\.weight$",
        "a whole weight of the base model is beside the adapter (PEFT: save_embedding_layers)",
    ),
)


def sort_keys(
    source: str, tensors: Mapping[str, RawTensor], kind: str
) -> tuple[dict[str, dict[str, RawTensor]], list[str]]:
    """The two tensors of each module, by the module's own name, and what was changed in names.

    `kind` is `lora` or `sparse`. Raises RefusedError for any tensor that is not one of the two, for
    two that would be the same and for two adapters in one file; CorruptError for half a module.
    """
    parts: dict[str, dict[str, RawTensor]] = {}
    origin: dict[tuple[str, str], str] = {}
    changes: Counter[str] = Counter()
    adapters: set[str] = set()
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        tail = found[3].split(".")[1:] if found else []
        if kind == "lora" and tail[-1:] == ["weight"]:
            tail.pop()
        if not found or found[2] not in _PARTS[kind] or len(tail) > 1 or _reason(key, _INSIDE):
            why = (
                _reason(key, _LEFT_OVER)
                or f"it is unknown in a {'LoRA' if kind == 'lora' else 'SHiRA'} file"
            )
            raise RefusedError(f"{source} holds the tensor {brief(key)}: {why}")
        if tail:
            adapters.add(tail[0])
            changes["the adapter's name is taken out"] += 1
        module, made = _own_name(found[1])
        changes.update(made)
        if not _MODULE.fullmatch(module):
            raise RefusedError(f"{source} holds the tensor {brief(key)}: no module has such a name")
        place = module, found[2]
        if place in origin:
            raise RefusedError(
                f"{source}: {brief(origin[place])} and {brief(key)} are both {found[2]} of "
                f"{cut(module)}"
            )
        origin[place] = key
        parts.setdefault(module, {})[found[2]] = tensor
    if len(adapters) > 1:
        raise RefusedError(
            f"{source} holds {len(adapters)} adapters: {cut(', '.join(sorted(adapters)[:5]))}",
            hint="save each on its own: save_pretrained(..., selected_adapters=[NAME])",
        )
    for module, pair in parts.items():
        if missing := [part for part in _PARTS[kind] if part not in pair]:
            raise CorruptError(
                f"{source}: {cut(module)} has {next(iter(pair))} but no {missing[0]}"
            )
    if not parts:
        raise CorruptError(f"{source} holds no tensor; it adapts nothing")
    return parts, [f"{what} ({count} tensor names)" for what, count in changes.items()]


def _own_name(path: str) -> tuple[str, list[str]]:
    """The name that the base model gives to a module, and how it was found."""
    changes: list[str] = []
    name = path
    for wrapper in _WRAPPERS:
        if f"{wrapper}." in f"{name}.":
            changes.append(f"{wrapper} is taken out")
            name = ".".join(word for word in name.split(".") if word != wrapper)
    if name.startswith(f"module.{PREFIX}"):
        changes.append("module. in front is taken away")
        name = name.removeprefix("module.")
    if not name.startswith(PREFIX):
        changes.append(f"{PREFIX} in front is missing")
    name = name.removeprefix(PREFIX)
    while name.startswith(PREFIX):
        changes.append(f"{PREFIX} in front is doubled; it may expect another adapter beneath it")
        name = name.removeprefix(PREFIX)
    if "base_layer" in name.split("."):
        changes.append("base_layer is taken out")
        name = ".".join(word for word in name.split(".") if word != "base_layer")
    return name, changes


def _reason(key: str, known: Mapping[re.Pattern[str], str]) -> str | None:
    for pattern, why in known.items():
        if pattern.search(key):
            return why
    return None
