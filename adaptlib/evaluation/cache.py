"""What was computed once: `derived/evaluation/<key>.jsonl` in a library, a line a row.

Lines are appended batch by batch, so an evaluation that is stopped or killed keeps what it has, and
one of more rows computes the new ones only. The key is over all that decides a line, so that it
cannot go stale; deleting the folder changes no answer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.evaluation.answers import Asked, Limits, Records
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the lines; another one is another key
FIELDS: Mapping[str, tuple[str, ...]] = {  # what a line has, by pass
    "answers": ("answer", "cut"),
    "labels": ("labels", "cut"),
    "losses": ("loss", "tokens", "cut"),
}
_MADE_AGAIN = "stacked"  # a router's field that `place` makes of the others


@final
@dataclass(frozen=True)
class Cache:
    """The folder, and what all keys have in common: the model and what runs it."""

    folder: Path
    base: str

    @classmethod
    def of(cls, library: Path, model: Any, tokenizer: "PreTrainedTokenizerBase") -> "Cache":
        """The cache of a library for one model, whose weights are all read for its key."""
        return cls(library / "derived" / "evaluation", base_digest(model, tokenizer))

    def key(self, subject: str, asked: Asked, needs: str, limits: Limits) -> str:
        """SHA-256 over what decides the lines: model, experts and router (`subject_digest`), task,
        split, what is computed and the options that change it. Not which rows: each has a line."""
        what = {
            "format": FORMAT,
            "base": self.base,
            "subject": subject,
            "task": asked.task.digest,
            "split": asked.split,
            "pass": needs,
            "max_length": limits.max_length,
            "max_new_tokens": limits.max_new_tokens if needs == "answers" else None,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def read(self, key: str, needs: str) -> Records:
        """What is there, by place. Lines that are not whole are left out: a kill can tear the last
        one."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            return {}
        found: Records = {}
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("row"), int):
                place = record.pop("row")
                if all(name in record for name in FIELDS[needs]):
                    found[place] = record
        return found

    def append(self, key: str, records: Records) -> None:
        """Keep more rows. They are written in one call at the file's end, so lines of several
        processes do not mix; what a kill tore is ended first, so that it harms no other line."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(
            json.dumps({"row": place, **record}, ensure_ascii=False) + "\n"
            for place, record in records.items()
        )
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, 2)
            torn = False
            if size:
                file.seek(size - 1)
                torn = file.read(1) != b"\n"
            file.write(("\n" if torn else "").encode() + lines.encode("utf-8", "surrogatepass"))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"


def base_digest(model: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over every weight, the config, the tokenizer, and the versions that compute."""
    found = hashlib.sha256()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        _add(found, name, value)
    config = model.config.to_diff_dict()
    for gone in ("_name_or_path", "transformers_version", "_commit_hash"):
        config.pop(gone, None)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    words = inner.to_str() if inner is not None else json.dumps(sorted(tokenizer.get_vocab()))
    template = getattr(tokenizer, "chat_template", None)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    where = [str(model.device.type), version("torch"), version("transformers")]
    what = [config, words, template, ends, where]
    found.update(json.dumps(what, sort_keys=True, default=str).encode())
    return found.hexdigest()


def subject_digest(experts: Mapping[str, Expert], router: Router | None) -> str:
    """SHA-256 over a router and the updates of the experts that it can choose; "base" for no
    router. UsageError where the router was made for other experts, as `attach` would say."""
    if router is None:
        return "base"
    if set(router.experts) != set(experts):
        other = sorted(set(router.experts) ^ set(experts))
        raise UsageError(
            f"router {router.name} was made for other experts: it knows {len(router.experts)}, got "
            f"{len(experts)}; only one of the two has {', '.join(other[:3])}",
            hint="fit the router to these experts, or evaluate it with its own",
        )
    made_for = dict(zip(router.experts, router.fitted, strict=True)) if router.fitted else {}
    found = hashlib.sha256(router.name.encode())
    for name in router.used:
        fingerprint = experts[name].fingerprint
        if made_for.get(name) not in (None, "", fingerprint):
            raise UsageError(
                f"router {router.name} was made for another {name}: its updates have changed since",
                hint="fit the router again, or evaluate it with the experts that it was made for",
            )
        found.update(f"{name} {fingerprint}\n".encode())
    for field in sorted(fields(router), key=lambda field: field.name):
        if field.name not in (_MADE_AGAIN, "fitted"):
            _add(found, field.name, getattr(router, field.name))
    return found.hexdigest()


def _add(found: Any, name: str, value: Any) -> None:
    """Add a number, a string, a tensor, or a mapping or sequence of these to a hash."""
    if isinstance(value, Tensor):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1)
        found.update(raw.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        found.update(f"{name} {{{len(value)}\n".encode())
        for key in sorted(value, key=str):
            _add(found, f"{name}/{key}", value[key])
    elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
        for i, part in enumerate(value):
            _add(found, f"{name}/{i}", part)
    else:
        found.update(f"{name} {value!r}\n".encode())
