"""What `add` takes: a directory, a place on the hub, or a value; read into an expert as bytes."""

import errno
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptlib.errors import NotFoundError, RefusedError, UsageError
from adaptlib.experts.codec import MANIFEST_NAME, Packed, pack, read_directory
from adaptlib.experts.tensors import cut
from library_store import InvalidName, Ref

if TYPE_CHECKING:
    from adaptlib.experts.expert import Expert

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PEFT_CONFIG = "adapter_config.json"


def read_source(
    source: "str | Path | Expert | Packed", base: str | None
) -> tuple[Packed, str, list[str]]:
    """The expert, a name for it, and notes."""
    if isinstance(source, Packed):
        return source, slug(str(source.card.get("task") or "expert")), []
    if not isinstance(source, str | Path):
        return pack(source), slug(str(source.card.get("task") or "expert")), []
    origin: dict[str, Any] = {}
    if str(source).startswith("hf://"):
        from adaptlib.experts.hub import fetch

        fetched = fetch(str(source))
        directory = fetched.directory
        name = fetched.subfolder or fetched.repo
        origin = {
            "source": {
                "hub": fetched.repo,
                "revision": fetched.revision,
                "subfolder": fetched.subfolder,
            }
        }
    else:
        directory = Path(os.path.expanduser(source))  # noqa: PTH111 -- raises on `~nobody`
        _check_directory(directory)
        name = directory.resolve().name
    packed = _read_directory(directory, base)
    notes: list[str] = []
    if not (directory / MANIFEST_NAME).exists():  # or a stranger's card would speak in our name
        notes += (packed.card.get("peft") or {}).get("migrated", ())
    return replace(packed, card=dict(packed.card) | origin), slug(name.rsplit("/", 1)[-1]), notes


def _check_directory(directory: Path) -> None:
    try:
        mode = os.stat(directory).st_mode  # noqa: PTH116 -- a Path's questions raise for some names
    except (FileNotFoundError, NotADirectoryError, ValueError):
        mode = 0
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        mode = 0
    if stat.S_ISREG(mode):
        if directory.suffix.lower() in PICKLES:
            raise RefusedError(
                f"{directory} is a pickle file; loading it can run code",
                hint="save the adapter as safetensors (PEFT: save_pretrained does)",
            )
        raise UsageError(
            f"{directory} is a file; add takes the directory of an adapter",
            hint=f"adaptlib add {directory.parent}",
        )
    if not stat.S_ISDIR(mode):
        what = "is no directory" if mode else "is not there"
        shown = cut(str(directory), 200)
        raise NotFoundError(f"{shown} {what}", hint="or, on the hub: hf://org/repo")


def _read_directory(directory: Path, base: str | None) -> Packed:
    if (directory / MANIFEST_NAME).exists():
        return read_directory(directory, writable=False)
    if (directory / PEFT_CONFIG).exists() or any(directory.glob("adapter_model.*")):
        from adaptlib.experts.peft import read_peft_packed

        return read_peft_packed(directory, base=base, writable=False)
    raise NotFoundError(
        f"{directory} holds no adapter: no {PEFT_CONFIG} (PEFT), no {MANIFEST_NAME} (adaptlib)",
        hint="give the directory that save_pretrained or adaptlib export wrote",
    )


def slug(text: str) -> str:
    """A valid name near `text`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64].rstrip("-._")
    try:
        return Ref(name or "expert").name
    except InvalidName:  # `a..b`, `x.lock`, a device's name on Windows
        return "expert-" + name.replace(".", "-")[:50].rstrip("-_")
