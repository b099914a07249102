"""The exceptions of the data layer and the type of its progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(stage, done, total)``: steps for :func:`cprec.data.prepare`, bytes for a download (total may be
None when the server does not say)."""


class DataError(ValueError):
    """Input that cannot be used. The message says what is wrong, where (``file:line``) and how to mend it.

    Attributes:
        path: the file or folder at fault, or None.
        line: its line, counted from 1, or None (a Parquet file has rows, not lines).
    """

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)
        self.path = None if path is None else Path(path)
        self.line = line


class DownloadError(DataError):
    """A data set that could not be fetched, or whose checksum is not the published one."""


def no_progress(stage: str, done: int, total: int | None) -> None:
    """The progress callback that shows nothing."""
