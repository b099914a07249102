"""What a user can get wrong, told in one line."""

from __future__ import annotations

from collections.abc import Iterable


class BenchmarkError(ValueError):
    """Wrong usage; the message names what there is instead. The command line exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> BenchmarkError:
    """The error for a name that does not exist."""
    return BenchmarkError(f"unknown {what} {name!r}; there are {', '.join(known)}")
