"""The ``ideal`` command. An interrupt is one line here already, while the rest is imported, which takes seconds."""

from __future__ import annotations

import sys

from service.cluster import interrupts


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its status.

    Args:
        arguments: the command and its options. Default: the process's own.
    """
    given = sys.argv[1:] if arguments is None else arguments
    interrupts.guard(given)
    from service.cli import guarded

    sys.exit(guarded(given))


if __name__ == "__main__":
    main()
