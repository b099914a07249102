"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``path`` that takes its place, flushed to the disk, when the block ends well. A link stays a link.

    Raises:
        OSError: it cannot be written, or is a pipe or a device. The error names ``path``, and nothing is left behind.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file that can be replaced", os.fspath(path))
    path = path.resolve()
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with stage.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    except BaseException as error:
        stage.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk's
            error.filename = os.fspath(path)
        raise
