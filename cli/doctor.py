"""adaptlib doctor: what this machine is and whether the library is well."""

import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from . import out
from .doctor_disk import Check
from .doctor_library import look_at_library
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats

EXAMPLES = ("adaptlib doctor", "adaptlib doctor --no-device", "adaptlib doctor --json")
PACKAGES = ("adaptlib", "torch", "transformers", "safetensors", "scikit-learn", "peft")
OPTIONAL = ("peft",)


def doctor(
    no_device: Annotated[
        bool, typer.Option("--no-device", help="Leave out the device, which loads PyTorch.")
    ] = False,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look at the library, its disk and the environment. Exit code 1 where something is wrong.

    How the file system behaves is found out by trying it, with files in the library's tmp/ that are
    removed again.
    """
    check_formats(json=json, plain=plain)
    checks = [*look_at_library(library), *_environment()]
    if not no_device:
        checks.append(_device())
    if json:
        out.document("doctor", checks=[asdict(check) for check in checks])
    elif plain:
        rows = [(one.name, one.status, one.detail, one.hint) for one in checks]
        out.plain_table(("name", "status", "detail", "hint"), rows)
    else:
        shown = [check for check in checks if not quiet or check.status == "fail"]
        if shown:
            rows = [(check.status, check.name, _words(check)) for check in shown]
            out.table([("STATUS", "left"), ("CHECK", "left"), ("FOUND", "fold")], rows)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _words(check: Check) -> str:
    return check.detail + (f"\nNext: {check.hint}" if check.hint else "")


def _environment() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Check(package, "ok", version(package))
        except PackageNotFoundError:
            if package in OPTIONAL:
                yield Check(package, "ok", "not installed (optional)")
            else:
                yield Check(package, "fail", "not installed", f"pip install {package}")


def _device() -> Check:
    try:
        import torch

        if torch.cuda.is_available():
            return Check("device", "ok", f"CUDA: {torch.cuda.get_device_name()}")
        return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads")
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check("device", "fail", f"PyTorch does not load: {error}", "pip install torch")
