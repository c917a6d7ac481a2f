"""Everything adaptlib raises on purpose.

    AdaptlibError                exit code 1
        UsageError               2   the call cannot be meant like this
        NotFoundError            3   a name, file or model that is not there
        CorruptError             4   bytes that are not what they claim to be
        ConflictError            5   a name that is taken
        RemoteError              6   the hub or the network
        RefusedError             7   unsafe or unsupported input
            BaseMismatchError    7   an expert that does not fit this base model

Each message says what went wrong, on which thing, what was there and what was wanted; `hint` is
the next thing to type or do.
"""


class AdaptlibError(Exception):
    """The root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AdaptlibError, ValueError):
    exit_code = 2


class NotFoundError(AdaptlibError, KeyError):  # so that `library.get(name)` is None
    exit_code = 3

    __str__ = Exception.__str__  # KeyError would print the repr


class CorruptError(AdaptlibError):
    exit_code = 4


class ConflictError(AdaptlibError):
    exit_code = 5


class RemoteError(AdaptlibError):
    exit_code = 6


class RefusedError(AdaptlibError):
    exit_code = 7


class BaseMismatchError(RefusedError):
    """An expert and a base model that do not belong together."""


class AdaptlibWarning(UserWarning):
    """The root of what the command line passes on as a sentence."""


class DataWarning(AdaptlibWarning):
    """Data that is used, but not as it was given: shortened or in part."""


class BaseWarning(AdaptlibWarning):
    """The base model may not be the one an expert was trained for; its shapes agree."""
