"""The one error that isn't the user's (``ideal.errors`` has the other), and an error in a line. It loads nothing."""

from __future__ import annotations


class StageFailed(Exception):
    """A stage that didn't come to its end; the command line exits with 1."""


def in_a_line(error: BaseException) -> str:
    """An error's text without its line breaks, and not all of it where it is long."""
    return " ".join(str(error).split())[:600]
