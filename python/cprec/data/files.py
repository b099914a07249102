"""Folders that appear whole or not at all, and checksums of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cprec.files import naming

from .columns import UNUSED_TIME
from .errors import DataError
from .sample import is_utf8_name

META = "meta.json"
MARKER = "cprec-prepared"


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: _hasher(algorithm)).hexdigest()


def _hasher(algorithm: str) -> Any:
    if algorithm == "blake2b":
        return hashlib.blake2b(digest_size=16)
    return hashlib.new(algorithm, usedforsecurity=False)


def fingerprint(meta: dict[str, Any]) -> str:
    """Digest of a meta.json without its own ``fingerprint`` entry, and without the names of the columns that were read and
    were not: the files say what was in them, and folders from before names were kept have the fingerprint of those from
    after."""
    body = {key: value for key, value in meta.items() if key != "fingerprint"}
    if isinstance(body.get("notes"), list):
        body["notes"] = [note for note in body["notes"] if not str(note).endswith(UNUSED_TIME)]
    if isinstance(body.get("source"), dict):
        body["source"] = {key: value for key, value in body["source"].items() if key != "columns"}
    text = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def of_one_preparation(folder: Path, expected: str) -> Iterator[None]:
    """For reading what was not read when a folder was opened: not from another one that has taken its name since.

    Raises:
        DataError: the folder is gone or holds another ``fingerprint`` than it did, before the reading or after it.
    """
    _check_same(folder, expected)
    try:
        yield
    finally:
        _check_same(folder, expected)


def _check_same(folder: Path, expected: str) -> None:
    found = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / META).read_text("utf-8")).get("fingerprint")
    if found != expected:
        done = "is gone" if found is None else "has been prepared again"
        raise DataError(f"{done} since it was opened; open it again, and prepare to another folder next time", folder)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target folder that must not be replaced.

    Raises:
        DataError: ``out`` has a name that is not UTF-8; it is the current folder; it exists and ``overwrite`` is False; or
            it is not a prepared folder, or holds files that ``prepare`` did not write, and so would not be deleted even
            with ``overwrite``.
    """
    if not is_utf8_name(out.resolve()):  # through links, as new_folder follows them
        raise DataError("the name is not UTF-8: choose another one, or rename the folder it is in", out)
    if not os.path.lexists(out):
        return
    if out.resolve() == Path.cwd():
        raise DataError("is the current folder, which cannot be replaced whole: name one in it, such as data", out)
    if not out.is_dir():
        raise DataError("exists and is not a folder; choose another output folder", out)
    names = sorted(entry.name for entry in out.iterdir())
    if not names:
        return
    if not overwrite:
        raise DataError("the folder exists already; pass overwrite=True (--overwrite) to replace it", out)
    meta: Any = None
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((out / META).read_text("utf-8"))
    if not isinstance(meta, dict) or meta.get("format") != MARKER:
        raise DataError("is not a folder written by prepare, so it is not replaced; choose another one", out)
    foreign = sorted(set(names) - {META, *meta.get("files", {})})
    if foreign:
        raise DataError(f"also holds files that prepare did not write ({', '.join(foreign[:5])}); move them away", out)


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its name when the block ends well and is deleted when it does not."""
    out = out.resolve()  # a link stays one, to the folder that is written
    check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = _sibling(out)
    try:
        with naming(out):
            work.mkdir()
            yield work
        check_target(out, overwrite)
        if out.exists() and any(out.iterdir()):
            old = work.with_suffix(".old")
            out.rename(old)
            try:
                work.rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.replace(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of the file ``path`` that takes its name when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _sibling(path)
    try:
        with naming(path):
            yield work
        work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def _sibling(path: Path) -> Path:
    """A hidden name beside ``path`` that nothing has yet."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
