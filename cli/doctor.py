"""adaptlib doctor: what this machine is and whether the library is well."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib doctor", "adaptlib doctor --json")
PACKAGES = ("adaptlib", "torch", "transformers", "safetensors", "scikit-learn", "peft")


def doctor(
    library: LibraryOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Look at the environment and the library. Exit code 1 where something is wrong."""
    checks = [*_environment(), *_library(library)]
    if json:
        out.document("doctor", checks=checks)
    else:
        for check in checks:
            if not quiet or check["status"] == "fail":
                out.line(f"{check['status']:<5} {check['name']:<13} {check['detail']}")
    if any(check["status"] == "fail" for check in checks):
        raise typer.Exit(1)


def _check(name: str, status: str, detail: str) -> dict[str, Any]:
    return {"name": name, "status": status, "detail": detail}


def _environment() -> list[dict[str, Any]]:
    checks = [_check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for package in PACKAGES:
        try:
            checks.append(_check(package, "ok", version(package)))
        except PackageNotFoundError:
            needed = package != "peft"
            checks.append(
                _check(
                    package,
                    "fail" if needed else "ok",
                    "not installed" + ("" if needed else " (optional)"),
                )
            )
    import torch

    if torch.cuda.is_available():
        detail = f"CUDA: {torch.cuda.get_device_name()}"
    else:
        detail = f"CPU, {torch.get_num_threads()} threads"
    checks.append(_check("device", "ok", detail))
    return checks


def _library(path: Any) -> list[dict[str, Any]]:
    from adaptlib.errors import AdaptlibError
    from adaptlib.experts.library import Library
    from adaptlib.experts.location import library_path
    from library_store import StoreError

    where, why = library_path(path)
    try:
        opened = Library.open(where)
        count = len(opened)
    except (AdaptlibError, StoreError, OSError) as error:
        return [_check("library", "fail", f"{error} ({why})")]
    checks = [_check("library", "ok", f"{where} ({why}), {count} experts")]
    free = shutil.disk_usage(where).free
    checks.append(_check("disk", "ok" if free > 10**9 else "warn", f"{out.size(free)} free"))
    writable = os.access(where, os.W_OK)
    checks.append(
        _check("writable", "ok" if writable else "warn", "yes" if writable else "no: reading only")
    )
    return checks
