"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError becomes one that names ``path`` if it names a temporary of it, or no file, as a full disk's does."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and f".{path.name}." not in str(error.filename):
            raise
        if error.errno is None and type(error) is not OSError:  # ours, of another file
            raise
        if error.errno is None:  # numpy's and safetensors' say what they did, not where
            raise OSError(f"{path}: cannot be written whole ({error}); is the disk full?") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream whose contents become ``path`` when the block ends well; otherwise nothing changes.

    A link stays a link: what it leads to changes. A pipe or a device is written to as it goes.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with naming(path), path.open("wb") as stream:
            yield stream
        return
    path = path.resolve()
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_leftover(name: str, of: Iterable[str]) -> bool:
    """Whether ``name`` is a temporary of a write of one of the files or folders ``of`` that was killed half-way.

    The names are those that :func:`atomic_write`, :mod:`cprec.checkpoint` and :mod:`cprec.data` give, and no wider:
    what this says yes to is deleted.
    """
    names = "|".join(map(re.escape, of))
    return re.fullmatch(rf"\.({names})\.([a-z0-9_]{{8}}|([0-9a-f]{{8}}|[0-9a-f]{{32}})\.(tmp|old))", name) is not None


def write_json(path: Path, values: Any) -> None:
    """``values`` as indented JSON, atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """The contents of a JSON file. Raises FileNotFoundError or ValueError that name ``what`` was expected."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {path.parent} is not {what}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not the JSON of {what}: {error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
