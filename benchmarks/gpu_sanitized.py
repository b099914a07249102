"""Every op once on a tiny catalogue: what ``compute-sanitizer`` watches, since it slows a kernel by a hundred times."""

from __future__ import annotations

import torch

from benchmarks.gpu_stages import OPERATIONS, TINY


def main(device: str = "cuda") -> None:
    """Forward and backward of every op in fp32 and bf16."""
    for operation in OPERATIONS.values():
        for dtype in (torch.float32, torch.bfloat16):
            operation(TINY, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
