"""Data sets on the Hugging Face hub: `hf://datasets/org/name[@rev][#config]`.

Read with the package `datasets`, an extra; never with code from the hub. Tokens, caches and
mirrors are huggingface_hub's own: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptlib.errors import (
    AdaptlibError,
    DataWarning,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)
from adaptlib.training.formats import Record

PREFIX = "hf://"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SPEC = re.compile(rf"hf://datasets/({_WORD}/{_WORD})(?:@({_WORD}))?(?:#({_WORD}))?")


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """(repo, revision, config) of `hf://datasets/org/name[@rev][#config]`; UsageError where it is
    not of this form."""
    found = _SPEC.fullmatch(spec)
    if not found or ".." in spec:
        raise UsageError(
            f"{spec[:200]!r} is not a data set on the hub; want "
            "hf://datasets/org/name[@rev][#config]",
        )
    repo, revision, config = found.groups()
    return repo, revision, config


def hub_records(
    spec: str, *, splits: Collection[str], columns: Collection[str]
) -> Iterator[Record]:
    """The records of the splits called one of `splits`, each with the split's name in the column
    `split`, and of the other columns those in `columns`. Class labels are their names.

    Warns of splits that are left out. Raises UsageError (no package `datasets`, a configuration
    must be chosen), NotFoundError (no such data set, revision or configuration, no such split),
    RefusedError (one that wants to run code) and RemoteError (network, rights, a hub that fails).
    """
    repo, revision, config = parse_spec(spec)
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{spec} is read with the package datasets, which is not installed",
            hint="pip install 'adaptlib[datasets]'",
        ) from error
    if Path(repo).exists():
        raise UsageError(
            f"{spec}: the package datasets would read the local {repo} instead",
            hint="run this in another folder",
        )
    with _quiet(datasets), _said_as_ours(spec):
        # to a data set with a script this is an error; trust_remote_code is never given
        found = datasets.load_dataset(repo, name=config, revision=revision)
    names = [str(name) for name in found]
    taken = [name for name in names if name in splits]
    others = [name for name in names if name not in splits]
    if not taken:
        raise NotFoundError(
            f"{spec} has none of the splits {', '.join(splits)}; it has {', '.join(others)}"
        )
    if others:
        left = f"{spec}: left out the splits {', '.join(others)}"
        warnings.warn(left, DataWarning, stacklevel=2)
    for split in taken:
        yield from _rows(found[split], split, f"{spec}, {split}", columns)


def _rows(data: Any, split: str, place: str, columns: Collection[str]) -> Iterator[Record]:
    wanted = [name for name in data.column_names if name in columns]
    if not wanted and data.column_names:
        wanted = data.column_names[:8]  # to be named in the error; few, since some are images
        yield f"{place}, row 1", {**dict.fromkeys(wanted), "split": split}
        return
    names = {name: getattr(data.features[name], "names", None) for name in wanted}
    for number, row in enumerate(data.select_columns(wanted), 1):
        for name, labels in names.items():
            value = row[name]
            if labels and isinstance(value, int) and 0 <= value < len(labels):
                row[name] = labels[value]
        yield f"{place}, row {number}", {**row, "split": split}


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars where nobody watches."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _said_as_ours(spec: str) -> Iterator[None]:
    """Errors of datasets, of huggingface_hub and of the HTTP client beneath it, as ours."""
    login = "is it spelled so? If it is private: hf auth login, or set HF_TOKEN"
    try:
        yield
    except AdaptlibError:
        raise
    except Exception as error:  # what is raised for what differs between versions of datasets
        text = " ".join(str(error).split())[:300]
        names = {kind.__name__ for kind in type(error).__mro__}
        if "BuilderConfig" in text:
            raise NotFoundError(f"{spec}: there is no such configuration: {text}") from error
        if "Config name is missing" in text:
            raise UsageError(
                f"{spec} has several configurations: {text.split('Example of usage')[0].strip()}",
                hint=f"say which: {spec}#CONFIG",
            ) from error
        if "scripts" in text or "trust_remote_code" in text:
            raise RefusedError(f"{spec} wants to run code of its own: {text}") from error
        if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
            raise NotFoundError(f"{spec} is not on the hub: {text}", hint=login) from error
        if names & {"DataFilesNotFoundError", "EmptyDatasetError"}:
            raise NotFoundError(f"{spec} has no files with data: {text}") from error
        raise RemoteError(
            f"{spec} cannot be read: {type(error).__name__}: {text}",
            hint="check the network (is HF_HUB_OFFLINE set?), or give a file that is here",
        ) from error
