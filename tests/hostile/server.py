"""Runs commands on hostile input, each in a forked child that is watched; see `watch.py`.

A line of JSON on standard input asks, a line on standard output answers:

    {"words": [...], "cwd": DIR, "write": [DIR, ...], "deed": null}
    {"code": 7, "out": "", "err": "...", "seconds": .02, "peak": 1.5, "deeds": [], "opened": []}

`seconds` are of processor time and `peak` is in MiB, above that of a child that does nothing.
"""

import io
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True

SECONDS = 20  # of processor time, after which the kernel ends a child


def warm(scratch: Path) -> None:
    """Import what the commands will need, so that a child's figures are those of its input."""
    from adaptlib.cli.main import invoke

    from tests.hostile import make

    library = scratch / "warm"
    lora, shira = make.adapter(scratch / "lora"), make.shira(scratch / "shira")
    expert = make.expert(scratch / "expert")
    recipe = scratch / "recipe.yaml"
    recipe.write_text("experts: [nobody]")
    for words in (
        ["init", library],
        ["add", lora, shira, "-L", library],
        ["add", expert, "--name", "third", "-L", library],
        ["list", "-L", library],
        ["show", "lora", "-L", library],
        ["verify", "-L", library],
        ["gc", "-L", library],
        ["log", "lora", "-L", library],
        ["export", "lora", scratch / "out", "-L", library],
        ["add", scratch / "none", "-L", library, "--json"],
        ["merge", "--recipe", recipe, "--name", "x", "-L", library],
    ):
        invoke([str(word) for word in words])


def serve(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Fork, run, wait, and say what happened."""
    files = [scratch / f"child.{name}" for name in ("out", "err", "seen")]
    child = os.fork()
    if child == 0:
        _child(request, files)
    _, status, usage = os.wait4(child, 0)
    seen = json.loads(files[2].read_text() or '{"deeds": [], "opened": []}')  # killed: nothing
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": files[0].read_text(errors="surrogateescape"),
        "err": files[1].read_text(errors="surrogateescape"),
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1024,
        **seen,
    }


def _child(request: dict[str, Any], files: list[Path]) -> None:
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(3 * SECONDS)  # for what waits for ever
        for number, path in enumerate(files[:2], 1):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", "backslashreplace")
        files[2].write_text("")
        os.chdir(request["cwd"])
        from tests.hostile import watch

        report = os.open(files[2], os.O_WRONLY)
        deeds, opened = watch.start(request["write"])
        try:
            if request["deed"]:
                watch.DEEDS[request["deed"]](Path(request["cwd"]))
                code = 0
            else:
                from adaptlib.cli.main import invoke

                code = invoke(request["words"])
        finally:
            watch.stop()
            os.write(report, json.dumps({"deeds": deeds, "opened": opened}).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="adaptlib-hostile-") as folder:
        scratch = Path(folder)
        replies = os.fdopen(os.dup(1), "w")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warm(scratch)
        rest = serve({"cwd": folder, "write": [folder], "deed": "nothing"}, scratch)
        replies.write('"ready"\n')
        replies.flush()
        for line in sys.stdin:
            reply = serve(json.loads(line), scratch)
            reply["peak"] -= rest["peak"]
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
