"""The head and the tail of a text file, and the refusals that need no more than them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cprec.serving_io import BLANK

from .errors import DataError

SAMPLE_BYTES = 1 << 16
_COMPRESSED = (
    *((b"\x1f\x8b", "gunzip"), (b"PK\x03\x04", "unzip"), (b"\xfd7zXZ", "unxz"), (b"BZh", "bunzip2")),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Stripped lines of the head with their numbers, blank ones left out, and lines near the end of the file."""

    head: list[tuple[int, str]]
    tail: list[str]
    ends_with_newline: bool

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.head]


def check_file(path: str | Path) -> Path:
    """``path`` as a Path to a readable file that is not empty. Raises DataError."""
    path = Path(path)
    if not is_utf8_name(path):
        raise DataError("the name is not UTF-8: rename it, or make a link of another name", path)
    if not path.exists():
        raise DataError("no such file", path)
    if not path.is_file():
        raise DataError("is not a file", path)
    if path.stat().st_size == 0:
        raise DataError("the file is empty", path)
    return path


def is_utf8_name(path: Path) -> bool:
    """Whether Polars can take this name, folders included: bytes that are not UTF-8 stand in it as half surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def is_parquet(path: Path) -> bool:
    """Whether the file starts with Parquet's magic bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def read_sample(path: Path) -> Sample:
    """Head and tail of a text file. Raises DataError for compressed, binary, blank, UTF-16 and non-UTF-8 content."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
        file.seek(max(0, size - SAMPLE_BYTES))
        tail = file.read(SAMPLE_BYTES) if size > SAMPLE_BYTES else b""
    last = tail or head
    for magic, tool in _COMPRESSED:
        if head.startswith(magic):
            raise DataError(f"is compressed; unpack it first ({tool})", path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is UTF-16; convert it (iconv -f UTF-16 -t UTF-8)", path)
    if b"\0" in head or b"\0" in tail:
        where = head.count(b"\n", 0, head.index(b"\0")) + 1 if b"\0" in head else None
        raise DataError("holds NUL bytes: a binary file, or a text file that was cut off or damaged", path, where)
    if b"\r" in head and b"\n" not in head:
        raise DataError("ends its lines with carriage returns alone: convert it, as `tr '\\r' '\\n'` does", path)
    if size > len(head) and b"\n" in head:
        head = head[: head.rindex(b"\n")]
    numbered = []
    for number, raw in enumerate(head.split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip(BLANK)
        except UnicodeDecodeError as error:
            if size > len(head) and error.reason == "unexpected end of data" and number == 1:
                text = raw[: error.start].decode("utf-8").strip(BLANK)  # one line longer than the sample
            else:
                raise not_utf8(path, number, raw) from None
        if text:
            numbered.append((number, text))
    if not numbered:
        raise DataError(f"the {'file' if size == len(head) else 'head of the file'} holds blank lines only", path)
    after = tail.split(b"\n")[1:]
    lines = [text for raw in after if (text := raw.decode("utf-8", "replace").strip(BLANK))]
    return Sample(numbered, lines, last.endswith(b"\n"))


def not_utf8(path: Path, line: int, raw: bytes) -> DataError:
    """The error for a line that is not UTF-8."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        return DataError(f"{byte} is not UTF-8; convert the file (iconv -f LATIN1 -t UTF-8)", path, line)
    return DataError("is not UTF-8", path, line)
