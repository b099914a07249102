"""What a compiled kernel costs, read from its machine code by the disassembler that Triton's wheel carries."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Matrix instructions: of Hopper's warp groups (HGMMA), of warps (HMMA); I/D/Q forms are other types'.
MATRIX = ("HGMMA", "HMMA", "QGMMA", "DMMA")
SPILLS = ("LDL", "STL")

Instruction = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Per thread: registers, and stack in bytes."""

    registers: int
    stack: int


@dataclasses.dataclass(frozen=True)
class Code:
    """Counts over a kernel. spills: in its innermost loops (in all of it when it has none).

    hot: instructions of its hot loop, that is the innermost loop with the most matrix instructions, of several the
    shortest; without any, the longest innermost loop; without a loop, all.
    """

    instructions: int
    hot: int
    spills: int
    matrix: int


def parse_usage(text: str) -> Usage:
    """From ``cuobjdump -res-usage``."""
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in what cuobjdump said: {text[:200]!r}")
    return Usage(int(found.group(1)), int(found.group(2)))


def parse_instructions(text: str) -> list[Instruction]:
    """Address and text of every instruction in a disassembler's listing."""
    lines = (re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line) for line in text.splitlines())
    return [(int(found.group(1), 16), found.group(2)) for found in lines if found]


def opcode(instruction: str) -> str:
    """``HGMMA`` of ``@!P0 HGMMA.64x128x16.F32.BF16 R24, ...``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[str]]:
    """Bodies between a backward branch and its target that hold no other such body."""
    spans = set()
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        # A branch to itself is the padding behind a kernel's end.
        if target and int(target.group(1), 16) < address:
            spans.add((int(target.group(1), 16), address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for address, text in instructions if lo <= address <= hi] for lo, hi in sorted(inner)]


def _count(body: Sequence[str], opcodes: Sequence[str]) -> int:
    found = collections.Counter(opcode(text) for text in body)
    return sum(found[name] for name in opcodes)


def measure(instructions: Sequence[Instruction]) -> Code:
    """Counts over a kernel's instructions."""
    everything = [text for _, text in instructions]
    # A wait for a barrier is a loop of its own, of a few instructions.
    loops = [body for body in innermost_loops(instructions) if len(body) > 8] or [everything]
    hot = max(loops, key=lambda body: (_count(body, MATRIX), -len(body) if _count(body, MATRIX) else len(body)))
    return Code(len(everything), len(hot), sum(_count(body, SPILLS) for body in loops), _count(everything, MATRIX))


def tools() -> Path:
    """Folder of the binaries in Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a compiled kernel: the one section of its ELF file that is named ``.text``.

    Raises:
        ValueError: not the ELF file of one kernel.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"not a little-endian 64-bit ELF file: it begins with {cubin[:6]!r}")
    # Offset and entries of the section table (ELF-64 specification, figure 2), then name, offset and size of each section.
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    sections = [(headers[names][4] + name, cubin[at : at + size]) for name, _, _, _, at, size in headers]
    (code, *others) = [body for name, body in sections if cubin.startswith(b".text.", name)] or [b""]
    if not code or others:
        raise ValueError(f"{len(others) + bool(code)} sections of code, not one")
    return code


def _ask(tool: str, *options: str) -> str:
    done = subprocess.run([str(tools() / tool), *options], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def usage(cubin: bytes) -> Usage:
    """Resource usage of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse_usage(_ask("cuobjdump", "-res-usage", file.name))


def disassemble(kernels: Sequence[bytes], arch: int) -> list[Code]:
    """Counts of several kernels' :func:`machine_code`.

    They lie behind one another in one file, because the disassembler takes half a second to start and a tenth to work.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(kernels))
        file.flush()
        # sm_90a is sm_90 and the matrix instructions of warp groups.
        listing = _ask("nvdisasm", "--binary", {90: "SM90a"}.get(arch, f"SM{arch}"), "--no-dataflow", file.name)
    instructions = parse_instructions(listing)
    addresses = [address for address, _ in instructions]
    ends = list(itertools.accumulate(len(code) for code in kernels))
    cuts = [0, *(bisect.bisect_left(addresses, end) for end in ends)]
    return [measure(instructions[first:last]) for first, last in itertools.pairwise(cuts)]
