"""PQTopK: search over items that are tuples of sub-item ids (Petrov, Macdonald, Tonellotto, "Efficient Inference of
Sub-Item Id-based Sequential Recommendation Models with Millions of Items", RecSys 2024), in plain torch.

Item i has m codes g_i1 .. g_im out of b; sub-embeddings psi (m, b, d / m). The hidden state h is cut into m pieces, and

    S[j, c] = <psi[j, c], h_j>,    score(i) = sum_j S[j, g_ij]

so a row costs b d products and m K additions. Codes are drawn at random: the time does not depend on which they are.
There is no such op in torch; the quickest of :data:`WAYS` and :data:`CHUNKS` is chosen while preparing. Scores of a chunk of
items stay in cache and are cut down to its k best; the (B, K) scores are never held.

Model of work: 2 b d B products, m K B additions; bytes: the codes, 4 each, the sub-embeddings, S and the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, normal
from benchmarks.ops.bench_clustered_softmax import Problem
from benchmarks.registry import Setting, Work

NUM_CODES, CODE_SIZE = 8, 256  # m and b, as in the paper's experiments
CODE_BYTES = FLOAT_BYTES = 4
CHUNKS = (1 << 14, 1 << 16)
TRIAL_ITEMS = 1 << 18  # that the ways are compared on
TRIAL_CALLS = 3


def missing_width(setting: Setting) -> str:
    width = setting.case.width
    return "" if width % NUM_CODES == 0 else f"width {width} does not divide into {NUM_CODES} sub-embeddings"


def draw_codes(case: Case) -> Tensor:
    """Random codes (K, m) int32; code c of sub-id j is j b + c, a row of S."""
    generator = torch.Generator().manual_seed(40)
    codes = torch.randint(CODE_SIZE, (case.num_items, NUM_CODES), generator=generator, dtype=torch.int32)
    return codes.add_(torch.arange(NUM_CODES, dtype=torch.int32) * CODE_SIZE)


def draw_sub_embeddings(case: Case) -> Tensor:
    """(m, b, d / m), for scores of variance 1."""
    return normal((NUM_CODES, CODE_SIZE, case.width // NUM_CODES), case.width**-0.5, seed=41)


def partial_scores(hidden: Tensor, sub_embeddings: Tensor) -> Tensor:
    """S as (m b, B)."""
    pieces = hidden.unflatten(1, (NUM_CODES, -1)).permute(1, 2, 0)  # (m, d / m, B)
    partial: Tensor = sub_embeddings @ pieces
    return partial.flatten(0, 1)


def all_scores(problem: Problem, dtype: torch.dtype) -> Tensor:
    """(B, K), term by term: the truth of the formula."""
    case = problem.setting.case
    partial = partial_scores(problem.hidden.detach().to(dtype), draw_sub_embeddings(case).to(dtype))
    scores = torch.zeros(case.tokens, case.num_items, dtype=dtype)
    for column in draw_codes(case).t():
        scores += partial[column].t()
    return scores


# Ways to sum the partial scores of a chunk of items and to take its k best: (S, codes, k) -> (B, k) scores and items.
Way = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def by_bags(partial: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = F.embedding_bag(codes, partial, mode="sum").topk(k, dim=0)  # (chunk, B)
    return best.values.t(), best.indices.t()


def by_transposed_bags(partial: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = F.embedding_bag(codes, partial, mode="sum").t().contiguous().topk(k, dim=1)
    return best.values, best.indices


def by_columns(partial: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = partial.t().contiguous()  # (B, m b)
    columns = codes.t()
    scores = rows.index_select(1, columns[0])
    for column in columns[1:]:
        scores += rows.index_select(1, column)
    best = scores.topk(k, dim=1)
    return best.values, best.indices


# Name -> the way, and whether it reads the codes of one sub-id at a time.
WAYS: dict[str, tuple[Way, bool]] = {
    "embedding_bag": (by_bags, False),
    "embedding_bag, transposed": (by_transposed_bags, False),
    "index_select": (by_columns, True),
}


def in_layout(codes: Tensor, by_column: bool) -> Tensor:
    """The codes (K, m), in memory sub-id by sub-id or item by item."""
    return codes.t().contiguous().t() if by_column else codes


def search(
    hidden: Tensor, sub_embeddings: Tensor, codes: Tensor, k: int, way: Way, chunk: int
) -> tuple[Tensor, Tensor]:
    """The k best items: those of every chunk, then the best of these."""
    partial = partial_scores(hidden, sub_embeddings)
    scores, items = [], []
    for start in range(0, codes.shape[0], chunk):
        part = codes[start : start + chunk]
        best, places = way(partial, part, min(k, part.shape[0]))
        scores.append(best)
        items.append(places + start)
    found = torch.cat(scores, 1).topk(k, dim=1)
    return found.values, torch.cat(items, 1).gather(1, found.indices)


def make_search(problem: Problem, k: int) -> tuple[Callable[[], tuple[Tensor, Tensor]], str]:
    """The quickest search on the first items of the catalogue, and what it is."""
    hidden, sub_embeddings = problem.hidden.detach(), draw_sub_embeddings(problem.setting.case)
    codes = draw_codes(problem.setting.case)
    best_s, best_way, best_chunk = float("inf"), "", 0
    for name, (way, by_column) in WAYS.items():
        few = in_layout(codes[:TRIAL_ITEMS], by_column)
        for chunk in CHUNKS:
            for _ in range(TRIAL_CALLS):
                start = time.perf_counter()
                search(hidden, sub_embeddings, few, k, way, chunk)
                elapsed = time.perf_counter() - start
                if elapsed < best_s:
                    best_s, best_way, best_chunk = elapsed, name, chunk
    way, by_column = WAYS[best_way]
    codes = in_layout(codes, by_column)
    note = f"{NUM_CODES} codes of {CODE_SIZE}, by {best_way} over {best_chunk:,} items"
    return lambda: search(hidden, sub_embeddings, codes, k, way, best_chunk), note


# Models


def work(problem: Problem) -> Work:
    case = problem.setting.case
    flops = 2.0 * CODE_SIZE * case.width * case.tokens + float(NUM_CODES) * case.num_items * case.tokens
    floats = CODE_SIZE * case.width + case.tokens * (case.width + NUM_CODES * CODE_SIZE)
    return Work(flops, 0.0, float(resident_bytes(problem)) + FLOAT_BYTES * floats)


def resident_bytes(problem: Problem) -> int:
    return CODE_BYTES * NUM_CODES * problem.setting.case.num_items


def call_bytes(problem: Problem) -> int:
    return 3 * FLOAT_BYTES * max(CHUNKS) * problem.setting.case.tokens
