"""100,000 queries from several threads against one mapped index."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import torch

from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss, TopKIndex

QUERIES, THREADS, K_BEST = 100_000, 4, 10
BAND = 2e-5  # nats: closer scores may come in either order in fp32


def test_soak(tmp_path):
    """Every thread draws batches of any size from all queries; each answer is the best ids of the fp64 definition."""
    torch.manual_seed(0)
    module = ClusteredSoftmaxWithLoss(24, Partition(2_500, [150, 700], [24, 8, 3], 24)).requires_grad_(False)
    for weight in module.weights:
        weight.mul_(15.0)  # logits spread by 1.5: some rows need every tail, some none
    hidden = torch.randn(QUERIES, 24)
    exact = module.double()
    best = [exact.log_prob(part.double()).topk(K_BEST + 1) for part in hidden.split(2_000)]
    scores, items = (torch.cat([part[i] for part in best]) for i in (0, 1))
    tied = (scores.diff(dim=1).abs() < BAND).any(1)
    assert tied.double().mean() < 0.01, "too many ties for a test of ids"
    module.float().build_index("float16", blocks="kd").save(tmp_path / "index")
    index = TopKIndex.load(tmp_path / "index", mmap=True)

    def ask(thread: int) -> tuple[int, int]:
        generator = random.Random(thread)
        own = torch.arange(thread, QUERIES, THREADS)
        wrong = levels = start = 0
        while start < len(own):
            rows = own[start : start + generator.choice((1, 2, 7, 31, 200))]
            start += len(rows)
            result = index.topk(hidden[rows], K_BEST)
            differs = (result.items != items[rows, :K_BEST]).any(1)
            # Where fp64 itself sees a tie the found items' scores have to be the best ones.
            found = result.scores.double() - scores[rows, :K_BEST]
            wrong += int((differs & ~tied[rows]).sum()) + int((differs & (found.abs().amax(1) > 1e-2)).sum())
            levels += int(result.counters[:, 0].sum())
        return wrong, levels

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(ask, range(THREADS)))
    assert sum(wrong for wrong, _ in answers) == 0
    assert QUERIES < sum(levels for _, levels in answers) < 3 * QUERIES
