"""The one exception for mistakes a user can make, and the one place that turns it into exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: one line that names the file, line or value, the limit and the remedy; `code` is for machines."""

    def __init__(self, text: str, code: str = "input") -> None:
        super().__init__(text)
        self.code = code


def run(main: Callable[[], object]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C gives 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells expect
