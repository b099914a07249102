"""Other people's models and checkpoints, read as block embeddings and clustered softmaxes."""

from ..nn.adaptive_layout import ClusteredLayout, from_adaptive_state_dict, to_adaptive_state_dict
from ._layouts import BlockLayout
from .dense import CompressionReport, compress
from .fairseq import from_fairseq_adaptive_input, from_fairseq_adaptive_softmax
from .plan import CompressionPlan
from .transformer_xl import from_transformer_xl_embedding, from_transformer_xl_softmax
from .vectors import set_item_vectors

__all__ = [
    "BlockLayout",
    "ClusteredLayout",
    "CompressionPlan",
    "CompressionReport",
    "compress",
    "from_adaptive_state_dict",
    "from_fairseq_adaptive_input",
    "from_fairseq_adaptive_softmax",
    "from_transformer_xl_embedding",
    "from_transformer_xl_softmax",
    "set_item_vectors",
    "to_adaptive_state_dict",
]
