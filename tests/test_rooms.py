"""The house keeps its plan: every op has its rooms, spelled alike, and imports point one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEMS = {"block_embedding", "clustered_softmax", "clustered_topk", "residual_stack", "row_optimizer", "topk_index"}
STEMS |= {"conv_norm_relu", "dropout", "gather_taps"}

# Folder, suffix -> the stems that must have a file there today. A file there whose name is not a stem, and is not
# listed beside it as shared by all ops, has lost its way. Kernels that come later add their stem here.
ROOMS: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    ("cprec_kernels/reference", ".py"): (STEMS, {"__init__", "common"}),
    ("cprec_kernels/ops", ".py"): (STEMS, {"__init__", "_library", "_reduction", "levels"}),
    ("cprec_kernels/nn", ".py"): (
        {"block_embedding", "clustered_softmax", "topk_index"},
        {
            "__init__",
            "adaptive_layout",
            "catalogue",
            "catalogue_blocks",
            "index_file",
            "index_packing",
            "pretrained",
            "reindexed",
            "softmax_base",
            "tied_blocks",
            "whole_file",
        },
    ),
    ("cprec_kernels/convert", ".py"): (
        {"dense", "fairseq", "plan", "transformer_xl", "vectors"},
        {"__init__", "_factors", "_layouts", "_partition"},
    ),
    ("cprec_kernels/optim", ".py"): ({"rowwise_adagrad", "rowwise_adamw"}, {"__init__", "_rowwise"}),
    ("cprec_kernels/_triton", ".py"): (
        {"block_embedding", "clustered_softmax", "clustered_topk"},
        {
            "__init__",
            "configs",
            "common",
            "ids",
            "tuning",
            "warmup",
            "block_embedding_backward",
            "block_embedding_projection",
        }
        | {"clustered_softmax_backward", "clustered_softmax_plan", "clustered_softmax_weight", "clustered_rank"}
        | {"clustered_topk_lse", "clustered_topk_prune", "clustered_topk_rows", "clustered_topk_scan"}
        | {"clustered_topk_select"},
    ),
    ("csrc/include/cprec", ".h"): (
        STEMS - {"clustered_topk", "gather_taps"},
        {"cpu", "dtype"},
    ),
    ("csrc/torch", ".cpp"): (
        STEMS,
        {"block_embedding_backward", "clustered_softmax_backward", "pool"},
    ),
    ("csrc/torch", ".h"): (
        set(),
        {"best_items", "block_embedding_call", "clustered_search", "clustered_softmax_levels", "pool", "threads"}
        | {"token_groups", "topk_index_leaves", "topk_index_levels", "topk_index_query", "topk_index_search"},
    ),
    ("csrc/cpu", ".h"): (
        STEMS - {"clustered_topk", "gather_taps"},
        {"block_embedding_backward", "half", "kernel_table", "math", "roofline", "softmax_block"}
        | {"softmax_count", "softmax_narrow", "transpose_x86", "vec_scalar", "vec_avx2", "vec_avx512"},
    ),
    ("csrc/cuda", ".cu"): ({"block_embedding"}, set()),
    ("tests/ops", ".py"): (
        {f"test_{stem}" for stem in STEMS},
        {"index_checks", "softmax_inputs", "test_forward_mode", "test_topk_index_edges", "test_topk_index_hunt"}
        | {f"test_clustered_softmax_{checks}" for checks in ("dispatch", "edges", "gradients")},
    ),
    ("tests/triton", ".py"): (
        {"test_block_embedding", "test_clustered_softmax", "test_clustered_topk"},
        {"conftest", "interpreter", "softmax_checks", "test_clustered_rank", "test_clustered_softmax_host"}
        | {"test_ids", "test_interpreter", "test_tuning", "test_warmup"},
    ),
    ("tests/optim", ".py"): (
        {"test_rowwise_adagrad", "test_rowwise_adamw"},
        {"steps", "test_pending_decay", "test_rowwise_state"},
    ),
    ("benchmarks/ops", ".py"): (
        # the index is in bench_clustered_topk; the others are a part of the steps that benchmarks.paper times
        {f"bench_{stem}" for stem in STEMS - {"row_optimizer", "topk_index", "dropout", "gather_taps"}},
        {"__init__", "bench_train_step", "bench_clustered_rank", "pqtopk"},
    ),
}


@pytest.mark.parametrize(("room", "contents"), ROOMS.items(), ids=[folder for folder, _ in ROOMS])
def test_every_stem_has_its_room_and_nothing_else_moved_in(room, contents):
    folder, suffix = room
    required, shared = contents
    present = {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}
    assert required <= present, f"{folder} lacks {sorted(required - present)}"
    allowed = shared | required | STEMS
    assert present <= allowed, f"{folder} holds {sorted(present - allowed)}, which are not ops"


def test_every_op_of_a_stem_is_registered_in_its_file():
    from cprec_kernels import _backend

    for op in _backend.ops():
        defining = [
            stem
            for stem in STEMS
            if f'"{op}(' in (text := (ROOT / f"cprec_kernels/ops/{stem}.py").read_text(encoding="utf-8"))
            or f'f"{op}(' in text
        ]
        assert len(defining) == 1, f"{op} is defined in {defining}"


# Layer -> the layers it may import from. A module's layer is the longest prefix that matches its name.
ARROWS = {
    "cprec": {"cprec", "cprec_kernels"},
    "cprec_kernels": {"cprec_kernels"},  # the package's front: __init__, __main__
    "cprec_kernels.nn": {
        "cprec_kernels.nn", "cprec_kernels.functional", "cprec_kernels.ops", "cprec_kernels.partition", "cprec_kernels.fitting",
    },
    "cprec_kernels.convert": {
        "cprec_kernels.convert", "cprec_kernels.nn", "cprec_kernels.fitting", "cprec_kernels.partition",
        "cprec_kernels.planning",
    },
    "cprec_kernels.optim": {
        "cprec_kernels.optim", "cprec_kernels.nn", "cprec_kernels.ops",
    },
    "cprec_kernels.functional": {"cprec_kernels.ops", "cprec_kernels.partition"},
    "cprec_kernels.ops": {
        "cprec_kernels.ops", "cprec_kernels.reference", "cprec_kernels._triton", "cprec_kernels._backend",
    },
    "cprec_kernels.reference": {"cprec_kernels.reference"},
    "cprec_kernels._triton": {"cprec_kernels._triton"},
    "cprec_kernels._backend": {"cprec_kernels._native"},
    "cprec_kernels._native": set(),
    "cprec_kernels._version": set(),
    "cprec_kernels.partition": {"cprec_kernels.planning"},  # from_counts hands over to it
    "cprec_kernels.planning": {"cprec_kernels.planning", "cprec_kernels.partition"},
    "cprec_kernels.fitting": set(),
    "cprec_kernels.testing": {"cprec_kernels.testing", "cprec_kernels.functional", "cprec_kernels.partition"},
    "cprec_kernels.testing.roofline": {"cprec_kernels._native"},
}  # fmt: skip
OUTSIDE_OF_KERNELS = {"torch", "numpy", "triton", "safetensors"}  # the last where it is asked for alone


def layer_of(module: str) -> str:
    fits = [layer for layer in ARROWS if module == layer or module.startswith(f"{layer}.")]
    return max(fits, key=len)


def is_module(name: str) -> bool:
    """Whether a name is that of a module of ours."""
    top, *rest = name.split(".")
    place = (ROOT / "python" if top == "cprec" else ROOT).joinpath(top, *rest)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imports_of(path: Path, module: str) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            # `from . import x` imports the module x of the package, and so may `from package import x`.
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= inner if node.module is None else {origin} | {name for name in inner if is_module(name)}
    return found


def python_modules() -> list[tuple[Path, str]]:
    modules = []
    for top in (ROOT / "cprec_kernels", ROOT / "python" / "cprec"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            modules.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return modules


@pytest.mark.parametrize(
    ("path", "module"), python_modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_one_way(path, module):
    layer = layer_of(module)
    for name in imports_of(path, module):
        top = name.split(".")[0]
        if top in ("cprec", "cprec_kernels"):
            target = layer_of(name)
            if layer == "cprec" and target.startswith("cprec_kernels"):
                public = {"convert", "nn", "functional", "optim", "partition", "planning"}
                public = {"cprec_kernels", *(f"cprec_kernels.{name}" for name in public)}
                assert target in public or target == "cprec_kernels._version", f"{module} reaches into {name}"
            elif layer == "cprec_kernels":
                assert top == "cprec_kernels", f"{module} imports {name}"
            else:
                assert target in ARROWS[layer], f"{module} ({layer}) imports {name} ({target})"
        elif module.startswith("cprec_kernels"):
            import sys

            assert top in OUTSIDE_OF_KERNELS or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_benchmarks_see_what_users_see():
    """Public API and cprec_kernels.testing, nothing behind them: a benchmark of internals measures nobody's program."""
    public = {
        f"cprec_kernels{name}"
        for name in (
            "",
            ".convert",
            ".functional",
            ".nn",
            ".optim",
            ".partition",
            ".planning",
            ".testing",
            ".testing.roofline",
        )
    } | {
        f"cprec{name}"
        for name in (
            "",
            ".checkpoint",
            ".data",
            ".evaluation",
            ".files",  # how results are written
            ".item_factors",
            ".model",
            ".planning",
            ".training",
        )
    }
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = {name for name in imports_of(path, module) if name.split(".")[0] in ("cprec", "cprec_kernels")}
        assert names <= public, f"{module} imports {sorted(names - public)}"


def test_kernels_know_no_torch():
    """csrc/cpu, csrc/cuda and csrc/include see plain data; only csrc/torch and the module include torch's headers."""
    for folder in ("csrc/cpu", "csrc/cuda", "csrc/include"):
        for path in (ROOT / folder).rglob("*.*"):
            included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text(encoding="utf-8"))
            bad = [name for name in included if re.match(r"(torch|ATen|c10|pybind11)/", name)]
            assert bad == [], f"{path} includes {bad}"
    for path in (ROOT / "csrc/include").rglob("*.h"):
        assert not re.search(r"#include\s+<cuda", path.read_text(encoding="utf-8")), f"{path}: CUDA types leak"


def test_the_kernels_of_an_isa_include_no_library_templates():
    """What is compiled for one instruction set may include C headers and intrinsics only: see csrc/cpu/half.h."""
    allowed = {"stdint.h", "string.h", "immintrin.h"}
    for path in [*(ROOT / "csrc/cpu").glob("*.h")]:
        included = re.findall(r"#include\s+<([^>]+)>", path.read_text(encoding="utf-8"))
        assert set(included) <= allowed, f"{path} includes {set(included) - allowed}"


def test_files_stay_readable():
    """Around 400 lines is one reading; what outgrows it is to be split."""
    for folder in ("cprec_kernels", "python", "csrc", "benchmarks"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu"}:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"


def test_clusters_a_kernel_takes_are_those_a_partition_allows():
    from cprec_kernels.partition import MAX_CLUSTERS

    header = (ROOT / "csrc/include/cprec/dtype.h").read_text(encoding="utf-8")
    assert f"kMaxClusters = {MAX_CLUSTERS};" in header
