"""``cprec_kernels.warmup``: a module's GPU kernels compiled before its first step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from . import _backend
from .nn import BlockEmbedding
from .nn.softmax_base import ClusteredSoftmaxBase
from .ops._library import asked_in_place

# Tokens of the rehearsed batch: above the largest tile of tokens, where no kernel's form depends on them any more.
NUM_TOKENS = 4096
AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)
Block = BlockEmbedding | ClusteredSoftmaxBase


def warmup(
    module: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    devices: Iterable[torch.device | str | int] | None = None,
) -> int:
    """Compile, in parallel, the Triton kernels that a module's first training and evaluation steps would stop for.

    Looks for every :class:`BlockEmbedding`, :class:`ClusteredSoftmaxWithLoss` and :class:`TiedBlocks` in ``module``. What is
    compiled depends on their ranks, width, biases and dtype, not on the size of the catalogue; a batch of at most 128 tokens
    may need one kernel more per level. Other libraries' kernels, and those of ``torch.compile``, are not touched.

    Args:
        module: a module with parameters on the device that it will run on, in the dtype that it will have.
        dtype: torch.bfloat16 or torch.float16 for a model that runs under ``torch.autocast`` with it. Default: the
            parameters' own dtype.
        devices: CUDA devices to compile for. Default: those of the parameters.

    Returns:
        How many kernels were compiled; 0 when all had been. 0, too, where nothing is to do: a module on the CPU (unless
        ``devices`` are given), or ops that another backend than Triton serves.

    Raises:
        RuntimeError: no such CUDA device, or a kernel that does not compile on it.
        TypeError: ``module`` is not a Module.
        ValueError: no module of ours in it, another dtype, a device that is not a CUDA device.
    """
    blocks = _blocks(module)
    _check_dtype(dtype, blocks)
    count = 0
    for device in _cuda_devices(blocks, devices):
        with FakeTensorMode():
            launches = [launch for block in blocks for launch in rehearse(block, dtype, device)]
        if launches:
            count += importlib.import_module("._triton.warmup", __package__).compile_all(launches, device)
    return count


def _blocks(module: nn.Module) -> list[Block]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"warmup takes a torch.nn.Module, got {type(module).__name__}; pass the model itself")
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} holds no BlockEmbedding, ClusteredSoftmaxWithLoss or TiedBlocks: there is nothing to "
            "warm up; pass the model that does"
        )
    return blocks


def _check_dtype(dtype: torch.dtype | None, blocks: Sequence[Block]) -> None:
    own = {table.dtype for block in blocks for table in block.parameters()}
    if dtype is not None and dtype not in AUTOCAST_DTYPES and own != {dtype}:
        raise ValueError(
            f"dtype = {dtype} is neither that of the parameters nor one of autocast (torch.bfloat16, torch.float16); "
            "leave it out, or convert the module first"
        )


def _cuda_devices(
    blocks: Sequence[Block],
    devices: Iterable[torch.device | str | int] | None,
) -> list[torch.device]:
    """The CUDA devices to compile for, each once."""
    if devices is None:
        found = [table.device for block in blocks for table in block.parameters() if table.device.type == "cuda"]
    else:
        found = [
            torch.device("cuda", device) if isinstance(device, int) else torch.device(device) for device in devices
        ]
    for device in found:
        if device.type != "cuda":
            raise ValueError(f"device {device} is not a CUDA device; kernels are compiled for those alone")
        if (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(
                f"there is no device {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            )
    return list(
        dict.fromkeys(torch.device("cuda", torch.cuda.current_device()) if d.index is None else d for d in found)
    )


def rehearse(block: Block, dtype: torch.dtype | None, device: torch.device) -> list[Any]:
    """The launches of an evaluation and a training step of a block on ``device``, in a FakeTensorMode; nothing runs."""
    if importlib.util.find_spec("triton") is None:
        return []
    common = importlib.import_module("._triton.common", __package__)
    ids = importlib.import_module("._triton.ids", __package__)
    launches: list[Any]
    with common.rehearse() as launches, torch.no_grad():
        if _backend.launches_triton():
            given = torch.empty(NUM_TOKENS, dtype=torch.int64, device=device)
            ids.check(given, block.partition.num_items, "ids" if isinstance(block, BlockEmbedding) else "target", None)
        if isinstance(block, BlockEmbedding):
            _embedding(block, device)
        else:
            _softmax(block, dtype, device)
    return launches


def _run(op: str, dtype: torch.dtype, *args: Any) -> Any:
    """What Triton's implementation of ``op`` returns; None where another one serves CUDA tensors of the dtype."""
    chosen = _backend.choose(op, "cuda", dtype).implementation
    return chosen.call(*args) if chosen.backend == "triton" else None


def _fakes(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in tensors]


def _any_trained(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _embedding(block: BlockEmbedding, device: torch.device) -> None:
    dtype = block.embeddings[0].dtype
    tables, projections = _fakes(block.embeddings, device), _fakes(block.projections, device)
    ids = torch.empty(NUM_TOKENS, dtype=torch.int64, device=device)
    grad = torch.empty(NUM_TOKENS, block.partition.embedding_dim, dtype=dtype, device=device)
    args = ids, tables, projections, block.padding_idx
    _run("block_embedding", dtype, *args, block.sparse)
    mask = [_any_trained(block.embeddings), _any_trained(block.projections)]
    if not any(mask):
        return
    if not block.sparse:
        _run("block_embedding_backward", dtype, grad, *args, mask)
        if mask[0] and asked_in_place(list(block.embeddings)):
            _run("block_embedding_backward_into", dtype, grad, *args, _fakes(tables, device), mask[1])
    elif _backend.choose("block_embedding_backward_sparse", "cuda", dtype).implementation.backend == "triton":
        backward = importlib.import_module("._triton.block_embedding_backward", __package__)
        backward.rehearse_sparse(grad, *args, mask)


def _softmax(block: ClusteredSoftmaxBase, dtype: torch.dtype | None, device: torch.device) -> None:
    # Tied tables are views, which need a gradient as their bases do.
    with unset_fake_temporarily(), torch.enable_grad():
        given = block.packed_weights()
    own = given.weights[0].dtype
    head_biases = [] if given.head_bias is None else [given.head_bias]
    weights = [
        _fakes(given.weights, device), _fakes(given.projections, device),
        next(iter(_fakes(head_biases, device)), None), _fakes(given.tail_biases, device),
    ]  # fmt: skip
    hidden = torch.empty(NUM_TOKENS, block.in_features, dtype=own, device=device)
    target = torch.empty(NUM_TOKENS, dtype=torch.int64, device=device)
    options = block.ignore_index, block.label_smoothing > 0, None if dtype in (None, own) else dtype
    args = hidden, target, *weights
    _run("clustered_softmax", own, *args, *options, False)
    results = _run("clustered_softmax", own, *args, *options, True)
    if results is None:
        return
    mask = [True, *map(_any_trained, (given.weights, given.projections, head_biases, given.tail_biases))]
    log_prob, uniform, *saved = results
    ignore_index, _, arithmetic = options
    smoothing = uniform if block.label_smoothing > 0 else None
    _run("clustered_softmax_backward", own, log_prob, smoothing, *args, *saved, ignore_index, arithmetic, mask)
