"""The instruction sets: what can be chosen, and that no instruction of one leaks into the code of another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import cprec_kernels
from cprec_kernels import _native

MODULE = _native.STATUS.module
pytestmark = pytest.mark.skipif(_native.STATUS.intended, reason="this package was built with CPREC_BUILD=none")
ISAS = [] if MODULE is None else MODULE.available_cpu_isas()


def test_the_module_is_built_where_tests_run():
    """Everything below depends on it; a run without it must not look green."""
    assert MODULE is not None, _native.STATUS.reason
    assert "block_embedding/cpu" in MODULE.build_config()["kernels"]


def test_isas_can_be_chosen_by_name():
    before = cprec_kernels.cpu_isa()
    assert cprec_kernels.available_cpu_isas() == ISAS
    try:
        for isa in ISAS:
            cprec_kernels.set_cpu_isa(isa)
            assert cprec_kernels.cpu_isa() == isa
        cprec_kernels.set_cpu_isa("auto")
        assert cprec_kernels.cpu_isa() == ISAS[-1]
        with pytest.raises(ValueError, match=r"isa = 'sse9' cannot run on this processor; choose one of scalar"):
            cprec_kernels.set_cpu_isa("sse9")
        assert cprec_kernels.cpu_isa() == ISAS[-1]
    finally:
        cprec_kernels.set_cpu_isa(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


LOOKUP = """
import torch
from cprec_kernels import Partition, nn, _native
nn.BlockEmbedding(Partition(10, [3], [4, 2], 4))(torch.tensor([1, 9]))
print(_native.STATUS.module.cpu_isa())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses(isa):
    result = run_python(LOOKUP, CPREC_CPU_ISA=isa)
    assert result.stdout.split() == [isa], result.stderr


def test_a_wrong_name_in_the_environment_fails_the_first_op_not_the_import():
    result = run_python(LOOKUP, CPREC_CPU_ISA="sse9")
    assert "CPREC_CPU_ISA = 'sse9' cannot run on this processor; choose one of scalar" in result.stderr
    assert run_python("import cprec_kernels", CPREC_CPU_ISA="sse9").returncode == 0


def functions(disassembly: str) -> dict[str, str]:
    """Function name -> its instructions, from ``objdump -d -C``."""
    blocks = re.split(r"\n[0-9a-f]+ <(.+)>:\n", disassembly)
    return dict(zip(blocks[1::2], blocks[2::2], strict=True))


@pytest.fixture(scope="module", params=["_C", "libcprec_serving"])
def code(request: pytest.FixtureRequest) -> dict[str, str]:
    if MODULE is None or len(ISAS) == 1:
        pytest.skip("no x86 module here")
    tool = shutil.which("objdump")
    assert tool is not None, "objdump (binutils) is needed to check the instructions of the native module"
    library = MODULE.__file__ if request.param == "_C" else str(cprec_kernels.serving_library())
    listing = subprocess.run(
        [tool, "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    )
    return functions(listing.stdout)


AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2[0-9]|3[01])\b")
AVX = re.compile(r"%ymm|\bv(?:fmadd|mov|add|mul|broadcast|cvt|xor|p)\w*\b.*%xmm")


def test_wide_instructions_stay_in_their_own_functions(code):
    """A shared inline function compiled for AVX-512 would stop the process on a machine that has none."""
    leaks_512 = [name for name, body in code.items() if "avx512" not in name and AVX512.search(body)]
    assert leaks_512 == []
    leaks_avx = [
        name for name, body in code.items() if "avx512" not in name and "avx2" not in name and AVX.search(body)
    ]
    assert leaks_avx == []


def test_the_check_for_leaks_sees_instructions(code):
    """Guards the test above: the wide kernels are in the listing and the patterns do match them."""
    assert any("avx512::" in name and AVX512.search(body) for name, body in code.items())
    assert any("avx2::" in name and AVX.search(body) for name, body in code.items())
    assert any("scalar::" in name for name in code)


def test_the_raw_kernel_refuses_what_the_op_would_have():
    """torch.ops.cprec_native is reachable without our checks: it must still not read out of bounds."""
    tables = [torch.randn(3, 4), torch.randn(7, 2)]
    projections = [torch.randn(2, 4)]
    call = torch.ops.cprec_native.block_embedding
    with pytest.raises(IndexError, match=r"ids\[1\] \(flattened\) = 10 is outside 0..9"):
        call(torch.tensor([0, 10]), tables, projections, None, False)
    with pytest.raises(IndexError, match=r"= -1 is outside"):
        call(torch.tensor([-1]), tables, projections, None, False)
    with pytest.raises(ValueError, match="needs a projection"):
        call(torch.tensor([0]), tables, [], None, False)
    with pytest.raises(ValueError, match=r"must be \(2, 5\)"):
        call(torch.tensor([0]), [torch.randn(3, 5), torch.randn(7, 2)], [torch.randn(3, 5)], None, False)
    with pytest.raises(TypeError, match="differ in dtype"):
        call(torch.tensor([0]), [tables[0], tables[1].double()], projections, None, False)
    with pytest.raises(ValueError, match=r"1..8 clusters, got 9"):
        call(torch.tensor([0]), [torch.randn(1, 2)] * 9, [], None, False)
