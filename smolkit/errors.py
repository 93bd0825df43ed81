"""The one exception for mistakes a user can make, and the one place that turns it into exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: one line that names the file, line or value, the limit and the remedy; `code` is for machines."""

    def __init__(self, text: str, code: str = "input") -> None:
        super().__init__(text)
        self.code = code


class Interrupted(Exception):
    """The run stopped as a signal asked it to, after saving; running the same command again continues it."""


# Exit codes: 0 finished, 2 a mistake of the user's, 75 stopped and saved (EX_TEMPFAIL of sysexits.h), 130 Ctrl-C.
STOPPED = 75


def run(main: Callable[[], object]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2, a stop after saving
    exit code 75, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells expect
