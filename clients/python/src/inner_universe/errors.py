"""What the command line ends with, as exceptions: one class for each exit code."""

from __future__ import annotations


class InnerUniverseError(RuntimeError):
    """A command failed. `exit_code` is its exit code, `hint` what its message says to do, empty if nothing."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        # Messages name what is wrong, then what to do.
        self.hint = message.split("; ", 1)[1] if "; " in message else ""


class UsageError(InnerUniverseError):
    """2: wrong usage or configuration."""


class FindingsError(InnerUniverseError):
    """3: something was found: by the checklist, by a verification, or in refused rows."""


class NothingToRestoreError(InnerUniverseError):
    """4: nothing to restore."""


class LockedError(InnerUniverseError):
    """5: another sidecar or deployment is at work."""


class RefusedError(InnerUniverseError):
    """6: refused, since it would overwrite something or break what runs."""


class StoreUnreachableError(InnerUniverseError):
    """7: the store cannot be reached."""


_BY_CODE: dict[int, type[InnerUniverseError]] = {
    2: UsageError,
    3: FindingsError,
    4: NothingToRestoreError,
    5: LockedError,
    6: RefusedError,
    7: StoreUnreachableError,
}


def of_exit(exit_code: int, message: str) -> InnerUniverseError:
    """The exception of an exit code."""
    return _BY_CODE.get(exit_code, InnerUniverseError)(message, exit_code)
