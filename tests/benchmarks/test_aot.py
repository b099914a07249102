"""``python -m benchmarks.aot``: reading machine code, the limits, the record, and what planted errors lead to."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import aot, sass
from benchmarks.aot import Record, Row, main, page, problems, read_record, write_record
from benchmarks.errors import BenchmarkError

ROOT = Path(__file__).parents[2]
GOOD = Row("k/bf16", 90, 4, 2, "", 128, 0, 1024, 0, True, 8, 900, 100, 4.0)

SASS = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x1 */
        /*0010*/                   STL [R1], R2 ;                    /* 0x2 */
        /*0020*/                   LDG.E R2, [R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/              @!P0 LDL.LU R7, [R1+0x8] ;
        /*0090*/                   ISETP.NE.AND P0, PT, R3, RZ, PT ;
        /*00a0*/               @P0 BRA 0x20 ;
        /*00b0*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00c0*/               @P1 BRA 0x10 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


# Reading machine code


def test_a_listing_is_read():
    instructions = sass.parse_instructions(SASS)
    assert len(instructions) == 16
    assert instructions[3] == (0x30, "HMMA.16816.F32.BF16 R4, R8, R12, R4 ")
    assert sass.opcode("@!P0 LDL.LU R7, [R1+0x8] ") == "LDL"
    assert sass.opcode("@UP0 UIADD3 UR4, UR5, 0x1, URZ ") == "UIADD3"
    (loop,) = sass.innermost_loops(instructions)
    assert [len(loop), loop[0]] == [9, "LDG.E R2, [R4.64] "]


def test_counts_are_of_the_innermost_loops():
    code = sass.measure(sass.parse_instructions(SASS))
    assert code == sass.Code(instructions=16, hot=9, spills=1, matrix=2)
    without = sass.measure(sass.parse_instructions(SASS.replace("BRA 0x", "BRA `(.L_x_1) 0xf")))
    assert without == sass.Code(instructions=16, hot=16, spills=2, matrix=2), "no loop: all of the kernel"


def test_the_hot_loop_is_the_one_with_the_products():
    def loop(at, body):
        lines = [*body, f"BRA {at:#x} "]
        return [(at + 16 * i, text) for i, text in enumerate(lines)]

    busy, lean, long = ["HMMA "] * 4 + ["FADD "] * 20, ["HMMA "] * 4 + ["FADD "] * 9, ["FADD "] * 60
    code = sass.measure([*loop(0, busy), *loop(0x1000, lean), *loop(0x2000, long)])
    assert code.hot == 14, "of loops with as many products the shortest: the others mask"
    assert sass.measure(loop(0x2000, long)).hot == 61


def test_resource_usage_is_read():
    text = " Function kernel:\n  REG:187 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:640 TEXTURE:0"
    assert sass.parse_usage(text) == sass.Usage(187, 24)
    with pytest.raises(ValueError, match="no resource usage"):
        sass.parse_usage("cuobjdump fatal : not a cubin")


def test_what_is_no_compiled_kernel_is_refused():
    with pytest.raises(ValueError, match="not a little-endian 64-bit ELF file: it begins with b'// PTX'"):
        sass.machine_code(b"// PTX of a kernel")
    # A header and a table of one section, which holds the names and no code.
    header = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + (0x40).to_bytes(8, "little") + bytes(10)
    header += b"".join(number.to_bytes(2, "little") for number in (0x40, 1, 0))
    with pytest.raises(ValueError, match="0 sections of code, not one"):
        sass.machine_code(header + bytes(0x40))


# Limits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "CompilationError: rank"}, "does not compile: CompilationError: rank"),
        ({"spills": 3}, "3 loads and stores of spilled registers"),
        ({"stack": 65}, "stack of 65 bytes per thread, over 64"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, over the 232448 of sm_90"),
        ({"arch": 80, "shared": 163 * 1024 + 1}, "166913 bytes of shared memory, over the 166912 of sm_80"),
        ({"matrix": 0}, "a product of 16-bit matrices without matrix instructions"),
        ({"per_logit": 4.61}, "4.61 instructions per logit, over 1.15 times the recorded 4"),
    ],
)
def test_every_limit_is_kept(change, message):
    assert problems(GOOD, GOOD) == []
    (found,) = problems(dataclasses.replace(GOOD, **change), GOOD)
    assert message in found


def test_what_is_at_a_limit_is_within():
    edge = dataclasses.replace(GOOD, stack=64, shared=227 * 1024, per_logit=4.6)
    assert problems(edge, GOOD) == []
    assert problems(dataclasses.replace(GOOD, dot=False, matrix=0), GOOD) == []
    assert problems(dataclasses.replace(GOOD, per_logit=40.0), None) == [], "nothing recorded: growth is not judged"


def test_kernels_without_logits_are_judged_by_their_hot_loop():
    before = dataclasses.replace(GOOD, per_logit=None)
    assert problems(dataclasses.replace(before, hot=115), before) == []
    (found,) = problems(dataclasses.replace(before, hot=116), before)
    assert "116 instructions in the hot loop, over 1.15 times the recorded 100" in found


# The record and the page


def test_a_record_is_read_back_and_a_broken_one_named(tmp_path):
    path = tmp_path / "gpu" / "aot.json"
    assert read_record(path) == {}
    records = {v: Record(v, "12.9", "2026-01-01", [GOOD]) for v in ("3.10.0", "3.9.0")}
    write_record(path, records)
    assert read_record(path) == records
    assert [r["triton"] for r in json.loads(path.read_text())["records"]] == ["3.9.0", "3.10.0"]
    for text in ("{", "[]", '{"schema": 2}', '{"schema": 1, "records": [{"rows": []}]}'):
        path.write_text(text)
        with pytest.raises(BenchmarkError, match=r"aot\.json"):
            read_record(path)


def test_the_page_shows_the_newest_and_what_is_outside():
    bad = dataclasses.replace(GOOD, name="spilling", spills=2)
    text = page({v: Record(v, "12.9", "2026-01-01", [GOOD, bad]) for v in ("3.10.0", "3.9.0")})
    assert text.index("## Triton 3.10.0") < text.index("## Triton 3.9.0")
    assert text.count("| `k/bf16` | 90 | 4 | 128 | 0 | 1.0 | 8 | 100 | 4.0 | within |") == 1
    assert text.count("- `spilling`, sm_90: 2 loads and stores") == 2


# The command


def call(capsys, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


@pytest.fixture
def planted(monkeypatch):
    """Two modules of kernels, one without cases, and a compiler that gives each case the row it is told."""
    rows: dict[str, Row] = {}
    with_cases = types.SimpleNamespace(
        aot_cases=lambda arch: [(name, None, {}, {}, row.warps, row.stages, True) for name, row in rows.items()]
    )
    monkeypatch.setattr(aot, "modules", lambda: ["planted"])
    monkeypatch.setitem(sys.modules, "planted", with_cases)
    monkeypatch.setattr(
        aot, "compile_all", lambda jobs, _, show: [dataclasses.replace(rows[name], arch=arch) for _, arch, name in jobs]
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows["k/bf16"] = GOOD
    return rows


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_record_then_growth_fails(planted, tmp_path, capsys):
    files = ("--record-file", tmp_path / "aot.json", "--page-file", tmp_path / "page.md")
    out, _ = call(capsys, *files, "--record")
    assert "2 of 2 within the limits" in out
    assert (tmp_path / "page.md").read_text() == page(read_record(tmp_path / "aot.json"))
    call(capsys, *files)
    planted["k/bf16"] = dataclasses.replace(GOOD, per_logit=5.0)
    out, _ = call(capsys, *files, expect=1)
    assert "FAIL k/bf16 sm_90" in out
    assert "5 instructions per logit, over 1.15 times the recorded 4" in out
    call(capsys, *files, "--record")
    call(capsys, *files)
    planted["new"] = dataclasses.replace(GOOD, name="new", spills=1)
    out, _ = call(capsys, *files, "--kernels", "new", expect=1)
    assert "0 of 2 within the limits" in out
    kept = (tmp_path / "aot.json").read_text()
    out, _ = call(capsys, *files, "--record", expect=1)
    assert "nothing was recorded" in out
    assert (tmp_path / "aot.json").read_text() == kept


@needs_triton
def test_every_tile_is_compiled_again_where_the_code_has_changed(planted, tmp_path, capsys, monkeypatch):
    code = "first"
    monkeypatch.setattr(aot, "package_sources", lambda: code)
    planted["k/bf16/64"] = dataclasses.replace(GOOD, name="k/bf16/64")  # a tile that --coarse leaves out
    files = ("--record-file", tmp_path / "aot.json", "--page-file", tmp_path / "page.md")
    out, _ = call(capsys, *files, "--changed")  # nothing is recorded
    assert "does not say of what: every tile" in out
    assert "4 of 4" in out
    call(capsys, *files, "--record")
    out, _ = call(capsys, *files, "--changed")
    assert "is of this code: some tiles of every kernel" in out
    assert "2 of 2" in out
    code = "second"
    out, _ = call(capsys, *files, "--changed")
    assert "is of other code: every tile of every kernel" in out
    assert "4 of 4" in out
    assert "2 of 2" in call(capsys, *files, "--coarse")[0]
    older = json.loads((tmp_path / "aot.json").read_text())
    for record in older["records"]:
        del record["sources"]
    (tmp_path / "aot.json").write_text(json.dumps(older))
    assert "4 of 4" in call(capsys, *files, "--changed")[0]


def test_comments_and_places_are_no_code(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = aot.sources(tmp_path)
    (tmp_path / "a.py").write_text("# a comment\n\nx = 1  # another\n")
    assert aot.sources(tmp_path) == first
    for name, text in (("a.py", "x = 2\n"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        assert aot.sources(tmp_path) != first
    assert len(aot.package_sources()) == 64


@needs_triton
def test_wrong_usage_is_one_line(planted, tmp_path, capsys, monkeypatch):
    for arguments, message in (
        (("--arch", 70), "--arch 70 is not one of 80, 86, 89, 90, 120"),
        (("--record", "--kernels", "k"), "--record keeps whole runs"),
        (("--record", "--coarse"), "--record keeps whole runs"),
        (("--record", "--changed"), "--record keeps whole runs"),
        (("--coarse", "--changed"), "--coarse and --changed exclude one another"),
        (("--kernels", "nothing"), "no case matches --kernels nothing"),
        (("--kernels", "("), "--kernels ( is not a regular expression"),
    ):
        _, err = call(capsys, *arguments, expect=2)
        assert err.startswith("benchmarks.aot: ")
        assert message in err
        assert err.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, err = call(capsys, expect=2)
    assert "TRITON_INTERPRET is set" in err


def test_two_cases_of_one_name_are_refused(planted, monkeypatch):
    with pytest.raises(BenchmarkError, match="several cases are named k/bf16"):
        aot.cases(["planted", "planted"], (80,))


PLANTED = """
import triton
import triton.language as tl

@triton.jit
def broken_kernel(p, n):
    tl.store(p, undefined_name)

@triton.jit
def kernel(p_a, p_b, p_c, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HIGH: tl.constexpr):
    o = tl.arange(0, BLOCK_T)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for i in range(4):
        acc = tl.dot(tl.load(p_a + o + i), tl.load(p_b + o - i), acc, input_precision=HIGH)
    tl.store(p_c + o, acc)

def aot_cases(arch):
    yield "broken", broken_kernel, {"p": "*fp32", "n": "i32"}, {}, 4, 2, True
    for name, kind, size, high in (("good", "bf16", 64, "ieee"), ("spilling", "fp32", 128, "ieee")):
        constexprs = {"BLOCK_T": size, "BLOCK_V": size, "HIGH": high}
        types = {"p_a": f"*{kind}", "p_b": f"*{kind}", "p_c": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
        yield name, kernel, types, constexprs, 4, 2, True
"""


@needs_triton
def test_real_kernels_are_compiled_and_judged(tmp_path, monkeypatch):
    """A good kernel, one that does not compile, and one that keeps more in registers than there are."""
    (tmp_path / "planted_kernels.py").write_text(PLANTED)
    script = (
        "import json, dataclasses; from benchmarks.aot import compile_cases; "
        "print(json.dumps([dataclasses.asdict(row) for a in (80, 90) "
        "for row in compile_cases([('planted_kernels', a, n) for n in ('good', 'broken', 'spilling', 'good')])]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [Row(**row) for row in json.loads(done.stdout)]
    assert [rows[0], rows[4]] == [rows[3], rows[7]], "the first and the last of those that are disassembled together"
    assert rows[4].matrix < rows[0].matrix, "an instruction of a warp group does the work of several"
    for row in rows:
        found = "; ".join(problems(row, None))
        if row.name == "good":
            assert found == ""
            assert row.dot
            assert row.matrix > 0
            assert row.registers > 16
            assert row.per_logit is not None
        else:
            assert ("undefined_name" if row.name == "broken" else "spilled registers") in found


@needs_triton
def test_every_kernel_module_has_cases():
    """What is compiled is what is there: a module that defines kernels and no cases would pass unseen."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = "from benchmarks.aot import *; print([(m, a, n) for m, a, n in cases(modules(), ARCHES)])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "cprec_kernels" / "_triton").glob("*.py"):
        # Helpers that kernels call are compiled with them; a kernel's name says that it is one.
        if "_kernel(" in path.read_text(encoding="utf-8"):
            assert f"_triton.{path.stem}'" in done.stdout, f"{path.name} defines kernels and no aot_cases"
    compiled = {row.key for record in read_record(aot.RECORD).values() for row in record.rows}
    listed = {(name, arch) for _, arch, name in ast.literal_eval(done.stdout)}
    assert compiled == listed, "the record is of other kernels: python -m benchmarks.aot --record"
    coarse = {(name, arch) for name, arch in listed if aot.COARSE.search(name)}
    assert len(coarse) < len(listed) / 2
    kernels = [{(name.split("/")[0], arch) for name, arch in these} for these in (listed, coarse)]
    assert kernels[0] == kernels[1], "--coarse leaves out a kernel"


MERGE = """
from cprec_kernels._triton.clustered_topk_lse import aot_cases
(case,) = (case for case in aot_cases(90) if case.name == "topk_merge/bf16/64")
"""
SCORE_OF_ODD_RANK = """
import torch
from cprec_kernels._triton import clustered_rank as of, clustered_topk_rows as rows, common
known = {"p_target": "*i64", "p_rank": "*i64", "p_items": "*i64", "p_next": "*i32"}
types = rows.pointer_types(of.clustered_score_kernel, torch.float32, known)
case = common.aot_case(
    "score", of.clustered_score_kernel, types, of._score_constants(17, 128, True), 4, 1, **common.row_sums(17)
)
"""
COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs)
options = {name: getattr(case, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@needs_triton
@pytest.mark.parametrize("case", [MERGE, SCORE_OF_ODD_RANK], ids=["merge", "score"])
def test_sums_across_threads_have_the_same_bits_in_all_of_them(case):
    """compute-sanitizer's racecheck found threads storing one sum with different last bits: of each lane's own product, fused into
    the addition, and the other lane's, rounded. (That of log2, which adds nothing across lanes, is fma.rn.ftz.)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", case + COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "shfl.sync.bfly" in done.stdout
    assert "fma.rn.f32" not in done.stdout
