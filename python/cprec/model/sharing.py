"""Layer-wise parameter sharing of the residual blocks (CpRec, arXiv 2004.13139, section 3.3).

A backbone of B blocks with S layers each has B * S layers. A *layer* is what the schemes share. In the "residual" block
(S = 2) it is one dilated convolution. The "bottleneck" block has one dilated convolution, to which its two 1x1
convolutions belong: there the whole block is one layer (S = 1). Layers share when they use the same parameter set, the
weights and biases of the convolutions. The dilation belongs to the place, so layers of different dilation may share.

LayerNorms are never shared: a gain and a bias, 2 d values beside the k d^2 + d of a convolution, save nothing, and they
fit the statistics of the activations at one depth, which differ between layers even where the convolution is the same.
"""

from __future__ import annotations

from typing import Literal, get_args

BlockKind = Literal["residual", "bottleneck"]
Sharing = Literal["none", "cross-layer", "cross-block", "adjacent-layer", "adjacent-block"]

BLOCK_KINDS: tuple[str, ...] = get_args(BlockKind)
SHARINGS: tuple[str, ...] = get_args(Sharing)
LAYERS_PER_BLOCK = {"residual": 2, "bottleneck": 1}


def check_sharing(block: str, sharing: str) -> None:
    """Raise ValueError when ``block`` or ``sharing`` is unknown, or when the two do not go together."""
    if block not in BLOCK_KINDS:
        raise ValueError(f"block = {block!r} is not one of {', '.join(map(repr, BLOCK_KINDS))}")
    if sharing not in SHARINGS:
        raise ValueError(f"sharing = {sharing!r} is not one of {', '.join(map(repr, SHARINGS))}")
    if block == "bottleneck" and sharing == "adjacent-layer":
        raise ValueError(
            "sharing = 'adjacent-layer' shares the two layers inside a block, but a bottleneck block is one layer: "
            "use 'adjacent-block' to share between neighbouring blocks, or block = 'residual'"
        )


def parameter_sets(num_blocks: int, block: str, sharing: str) -> tuple[tuple[int, ...], ...]:
    """Index of the parameter set that every layer uses: one tuple per block, one index per layer in it.

    Sets are numbered 0, 1, ... in the order of first use. A bottleneck block is one layer, so for it "cross-layer" and
    "cross-block" are the same. With "adjacent-block" and an odd number of blocks the last block has sets of its own.

    Raises:
        ValueError: from :func:`check_sharing`.

    Example:
        >>> parameter_sets(3, "residual", "adjacent-block")
        ((0, 1), (0, 1), (2, 3))
    """
    check_sharing(block, sharing)
    layers = LAYERS_PER_BLOCK[block]

    def index(b: int, layer: int) -> int:
        match sharing:
            case "cross-layer":
                return 0
            case "cross-block":
                return layer
            case "adjacent-layer":
                return b
            case "adjacent-block":
                return b // 2 * layers + layer
            case _:
                return b * layers + layer

    return tuple(tuple(index(b, layer) for layer in range(layers)) for b in range(num_blocks))


def set_count(num_blocks: int, block: str, sharing: str) -> int:
    """Number of different parameter sets, in closed form.

    For B blocks of S layers (2 residual, 1 bottleneck): none B * S; cross-layer 1; cross-block S; adjacent-layer B;
    adjacent-block ceil(B / 2) * S.
    """
    check_sharing(block, sharing)
    layers = LAYERS_PER_BLOCK[block]
    counts = {
        "none": num_blocks * layers,
        "cross-layer": 1,
        "cross-block": layers,
        "adjacent-layer": num_blocks,
        "adjacent-block": (num_blocks + 1) // 2 * layers,
    }
    return counts[sharing]


def set_parameters(block: str, width: int, kernel_size: int) -> int:
    """Parameters of one set, for width d and kernel size k.

    Residual: one convolution, k d^2 + d. Bottleneck, with m = d // 2: 1x1 down d m + m, dilated k m^2 + m and 1x1 up
    m d + d.
    """
    if block == "residual":
        return kernel_size * width * width + width
    middle = width // 2
    return (width * middle + middle) + (kernel_size * middle * middle + middle) + (middle * width + width)


def norm_parameters(block: str, width: int) -> int:
    """LayerNorm parameters of one block: residual 2 (2 d); bottleneck 2 d + 2 (2 m) with m = d // 2."""
    return 4 * width if block == "residual" else 2 * width + 4 * (width // 2)


def backbone_parameters(num_blocks: int, block: str, sharing: str, width: int, kernel_size: int) -> int:
    """Parameters of the whole backbone: ``set_count * set_parameters + num_blocks * norm_parameters``.

    Written out for B residual blocks of width d and kernel size k, with c = k d^2 + d:
    none 2 B c + 4 B d; cross-layer c + 4 B d; cross-block 2 c + 4 B d; adjacent-layer B c + 4 B d;
    adjacent-block 2 ceil(B / 2) c + 4 B d.
    """
    sets = set_count(num_blocks, block, sharing) * set_parameters(block, width, kernel_size)
    return sets + num_blocks * norm_parameters(block, width)
