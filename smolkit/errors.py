"""The one exception for mistakes a user can make, and the one place that turns it into exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: one line that names the file, line or value, the limit and the remedy; `code` is for machines."""

    def __init__(self, text: str, code: str = "input") -> None:
        super().__init__(text)
        self.code = code


class Interrupted(Exception):
    """The run stopped as a signal asked it to, after saving; running the same command again continues it."""


# Exit codes: 0 finished, 2 a mistake of the user's, 75 stopped and saved (EX_TEMPFAIL of sysexits.h), 130 Ctrl-C.
STOPPED = 75


# What a disk answers that is full, or may not be written. Anything else is a mistake of ours and keeps its traceback.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def refusal(error: Exception) -> str | None:
    """What a disk that takes no more, or a file that may not be opened, said; None for every other error."""
    code = getattr(error, "errno", None)
    # By name: this room imports no library. It tells the number in its text alone.
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(found[1])
    # EACCES is a socket's answer, too, which has no path.
    closed = code == errno.EACCES and getattr(error, "filename", None) is not None
    return os.strerror(code) if code is not None and (code in REFUSED or closed) else None


@contextmanager
def writing(place: object) -> Iterator[None]:
    """Within: a disk's refusal becomes a `UserError` that names `place`, a file or directory."""
    try:
        yield
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        raise UserError(
            f"cannot write {place}: {reason}; earlier checkpoints are untouched: mend that and run the same command "
            "again"
        ) from error


def run(main: Callable[[], object]) -> None:
    """Run a script's `main`; a `UserError` or a disk's refusal becomes one line on stderr and exit code 2, a stop
    after saving exit code 75, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        path = getattr(error, "filename", None)
        print(f"error: {path}: {reason}" if path is not None else f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells expect
