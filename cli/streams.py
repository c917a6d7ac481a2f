"""What a process meets at its ends: closed streams, broken pipes and signals."""

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED, BROKEN, TERMINATED = 130, 141, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM. It goes the way of Ctrl-C, so that whatever is under way is kept or taken back."""


def guarded(command: Callable[[], int]) -> int:
    """Run what returns an exit code, with all streams open and signals heard, and flush what it
    wrote. A pipe whose reader left is no error, and neither is a signal; each has its code.

    The first Ctrl-C is an exception, the second one ends the process there and then.
    """
    try:
        _open_streams()
        signal.signal(signal.SIGINT, _heard)
        signal.signal(signal.SIGTERM, _heard)
        code = command()
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except KeyboardInterrupt as error:
        return stopped(error)
    except BrokenPipeError:
        return broken()


def stopped(error: BaseException) -> int:
    """One word on a signal, and its exit code."""
    ended = isinstance(error, Terminated)
    try:
        sys.stderr.write("Terminated\n" if ended else "Interrupted\n")
        sys.stderr.flush()
    except BrokenPipeError:
        broken()
    return TERMINATED if ended else INTERRUPTED


def broken() -> int:
    """Let what is still to be written go nowhere: at its end Python flushes both streams."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    return BROKEN


def _heard(number: int, _: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _open_streams() -> None:
    """Streams that the caller closed lead nowhere. Left closed, the next file that is opened would
    get their number, and output be written into it."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A character that the encoding lacks, such as the Greek in help, is an escape and no error.
        sys.stdout.reconfigure(errors="backslashreplace")
