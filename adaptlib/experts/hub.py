"""Adapters on the Hugging Face hub: `hf://org/repo[@rev][/subfolder]`.

`rev` is a branch, a tag or a commit, and has no `/` in it (so no `refs/pr/1`; give the commit).
Only the files of an adapter are fetched, never a pickle, and all of one commit, which is recorded.
Tokens, caches and mirrors are huggingface_hub's own: HF_TOKEN, HF_HOME, HF_ENDPOINT.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptlib.errors import (
    AdaptlibError,
    CorruptError,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)
from adaptlib.experts.codec import BLOB_NAME, MANIFEST_NAME, MAX_MANIFEST
from adaptlib.experts.peft import PICKLE_NAMES, WEIGHTS_NAME
from adaptlib.experts.peft_config import CONFIG_NAME, MAX_CONFIG

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

MAX_WEIGHTS = 16 << 30  # bytes
MAX_SPEC = 512  # characters
TIMEOUT = 30.0  # seconds, for the listing
# The most bytes of each file that is fetched. Nothing else of a repository is.
_WANTED = {
    CONFIG_NAME: MAX_CONFIG,
    WEIGHTS_NAME: MAX_WEIGHTS,
    MANIFEST_NAME: MAX_MANIFEST,
    BLOB_NAME: MAX_WEIGHTS,
    "README.md": MAX_MANIFEST,
}
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SPEC = re.compile(rf"hf://({_WORD}/{_WORD})(?:@([^/]*))?(?:/(.*))?", re.DOTALL)
_FOLDER = re.compile(r"[A-Za-z0-9._+=,@ -]*[A-Za-z0-9_+=@-]")  # no end that Windows would drop


@dataclass(frozen=True)
class Fetched:
    """An adapter that is on this machine now: the directory, and where on the hub it is from.
    `revision` is the commit, 40 hexadecimal digits."""

    directory: Path
    repo: str
    revision: str
    subfolder: str | None


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """(repo, revision, subfolder) of `hf://org/repo[@rev][/subfolder]`. UsageError where it is not
    of this form, RefusedError for a subfolder or revision that is a path trick."""
    found = _SPEC.fullmatch(spec)
    if not found or len(spec) > MAX_SPEC:
        raise UsageError(
            f"{spec[:200]!r} is not a place on the hub; want hf://org/repo[@rev][/subfolder]"
        )
    repo, revision, subfolder = found.groups()
    if revision is not None and (not re.fullmatch(_WORD, revision) or ".." in revision):
        raise RefusedError(
            f"{spec[:200]!r} has the revision {revision[:80]!r}; want a branch, tag or commit of "
            "letters, digits, '.', '_' and '-'"
        )
    for name in subfolder.split("/") if subfolder is not None else ():
        if not _FOLDER.fullmatch(name):
            raise RefusedError(
                f"{spec[:200]!r} has a subfolder in which {name[:80]!r} is not the plain name of a "
                "folder"
            )
    return repo, revision, subfolder


def fetch(spec: str) -> Fetched:
    """The adapter at `hf://org/repo[@rev][/subfolder]`, in huggingface_hub's cache.

    Raises UsageError and RefusedError (see `parse_spec`; also a repository with a pickle only, and
    a file over its limit), NotFoundError (no such repository, revision or subfolder, no adapter in
    it), CorruptError (weights with another SHA-256 than the hub lists), and RemoteError (network,
    rights, a hub that fails).
    """
    repo, revision, subfolder = parse_spec(spec)
    from huggingface_hub import HfApi, snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    with _said_as_ours(spec):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        files = {file.rfilename: file for file in info.siblings or ()}
        commit = info.sha or ""
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise RemoteError(f"{spec}: the hub names no commit; got {commit[:80]!r}")
        here = _wanted(spec, prefix, files)
        snapshot = snapshot_download(
            repo, revision=commit, allow_patterns=[prefix + name for name in here]
        )
    directory = Path(snapshot, subfolder or "")
    for name, file in here.items():
        _check_file(spec, directory / name, file)
    return Fetched(directory, repo, commit, subfolder)


def check_model(name: str, *, revision: str | None = None) -> None:
    """Ask the hub once whether it has a model: NotFoundError where not, RemoteError where nobody
    answers, RefusedError where it is an adapter, which transformers would load as one. Without it,
    transformers tries for a minute before it says so."""
    from huggingface_hub import HfApi

    with _said_as_ours(f"the base model {name}"):
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
    if any(file.rfilename == CONFIG_NAME for file in info.siblings or ()):
        raise RefusedError(
            f"{name} on the hub holds an adapter, so it is no base model",
            hint=f"adaptlib add hf://{name}",
        )


def _wanted(spec: str, prefix: str, files: "Mapping[str, RepoSibling]") -> "dict[str, RepoSibling]":
    """The files of one adapter in the listing of a repository, by their last name."""
    here = {name: files[prefix + name] for name in _WANTED if prefix + name in files}
    if not here.keys() & {WEIGHTS_NAME, BLOB_NAME}:
        if pickles := [name for name in PICKLE_NAMES if prefix + name in files]:
            raise RefusedError(
                f"{spec} has its weights in {pickles[0]} only, a pickle; loading it can run code",
                hint="ask its authors for adapter_model.safetensors",
            )
        folders = sorted(
            name.rpartition("/")[0] or "the top folder"
            for name in files
            if name.rpartition("/")[2] in (WEIGHTS_NAME, BLOB_NAME)
        )
        absent = prefix and not any(name.startswith(prefix) for name in files)
        raise NotFoundError(
            f"{spec}: there is no such folder" if absent else f"{spec} holds no {WEIGHTS_NAME}",
            hint=f"adapters are in: {', '.join(folders[:5])}" if folders else None,
        )
    for name, file in here.items():
        if (file.size or 0) > _WANTED[name]:
            raise RefusedError(
                f"{spec}: {prefix}{name} has {file.size:,} bytes; at most {_WANTED[name]:,} are "
                "read"
            )
    return here


def _check_file(spec: str, path: Path, file: "RepoSibling") -> None:
    """The bytes are those that the hub lists; huggingface_hub compares sizes only."""
    if not path.is_file():
        raise RemoteError(f"{spec}: {path.name} was not downloaded", hint="try again")
    if (size := path.stat().st_size) > _WANTED[path.name]:  # where the hub lists no size
        raise RefusedError(
            f"{spec}: {path.name} has {size:,} bytes; at most {_WANTED[path.name]:,} are read"
        )
    if file.size is not None and size != file.size:
        raise CorruptError(
            f"{spec}: {path.name} has {size:,} bytes; the hub lists {file.size:,}",
            hint=f"remove it and try again: {path}",
        )
    if file.lfs is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.lfs.sha256:
        raise CorruptError(
            f"{spec}: {path.name} has the SHA-256 {found[:16]}…; the hub lists "
            f"{file.lfs.sha256[:16]}…",
            hint=f"remove it and try again: {path}",
        )


@contextmanager
def _said_as_ours(spec: str) -> Iterator[None]:
    """Errors of huggingface_hub, and of the HTTP client beneath it, as ours."""
    from huggingface_hub import errors

    login = "it may be private: hf auth login, or set HF_TOKEN"
    try:
        yield
    except AdaptlibError:
        raise
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise RemoteError(
            f"{spec} cannot be fetched: {_first_line(error)}",
            hint="connect (is HF_HUB_OFFLINE set?), or add a directory that is here",
        ) from error
    except errors.GatedRepoError as error:
        raise RemoteError(
            f"{spec} is gated", hint="accept its terms on the hub, then: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:  # 401 as well: the hub hides private ones
        raise NotFoundError(f"{spec}: there is no such repository", hint=login) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{spec}: there is no such revision") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 404:
            raise NotFoundError(f"{spec} is not on the hub", hint=login) from error
        raise RemoteError(
            f"{spec}: the hub answered {status}: {_first_line(error)}",
            hint=login if status in (401, 403) else "try again later",
        ) from error
    except Exception as error:  # the HTTP client differs between versions of huggingface_hub
        raise RemoteError(
            f"{spec} cannot be fetched: {type(error).__name__}: {_first_line(error)}",
            hint="check the network, then try again",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
