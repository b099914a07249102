"""What ``quick`` measures: every op once, without the providers that alone would take longer than all others."""

from __future__ import annotations

# Op, case, providers (none: all).
QUICK: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("clustered_softmax", "100k-d128-t512", ()),
    (
        "clustered_softmax",
        "1m-d128-t512",
        ("cprec-avx512", "cprec-avx2", "reference", "torch-adaptive"),
    ),
    ("block_embedding", "1m-d128-t25600", ()),
    ("conv_norm_relu", "100k-d128-t512", ()),
    ("train_step", "1m-d128-t512", ("cprec-avx512", "cprec-avx2", "torch-fused-adam", "torch-adam")),
    ("clustered_topk", "100k-d128-b32", ()),
    ("clustered_rank", "100k-d128-b256", ()),
    ("residual_stack", "100k-d64-b1", ()),
)
