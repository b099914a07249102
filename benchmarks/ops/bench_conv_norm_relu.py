"""One layer of NextItNet's residual blocks in training: T items of histories one below the other, (T, d) to (T, d).

Histories hold 1..20 items, as many of one length as of any other, without padding; three taps, dilation 2. Peers are torch's own
ops on the same parameters: "torch-linear" gathers the rows of the taps and multiplies once, "torch-conv1d" takes the histories
padded to 20 places, as models mostly do, and is compared at the items.

The matrix products are torch's in every row, so roofs are those of the widest instruction set.

Model of work: products 2 d^2 for every tap of every row, padded ones included where they are computed, forward and twice
backward; bytes: input and output, the weights, and all of their gradients, once per pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import normal
from benchmarks.registry import ISAS, Op, Prepared, Provider, Results, Setting, Work, forced_isa, missing_isa
from benchmarks.registry import reference_backend as plain_torch
from cprec_kernels import functional

FLOAT_BYTES = 4
LENGTH, TAPS, DILATION, EPS = 20, 3, 2, 1e-8
PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias")


class Problem:
    """Inputs of a setting, and the parameters that its providers share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.backward = setting.mode == "fwd_bwd"
        tokens, width = setting.case.tokens, setting.case.width
        lengths = torch.randint(1, LENGTH + 1, (tokens,), generator=torch.Generator().manual_seed(1))
        ends = lengths.cumsum(0)
        users = int((ends < tokens).sum()) + 1
        user = torch.searchsorted(ends[:users], torch.arange(tokens), right=True)
        # The newest item is in the last place; the last history lacks its newest ones.
        self.place = LENGTH - (ends[user] - torch.arange(tokens))
        self.places = user * LENGTH + self.place
        self.num_users = users
        lags = DILATION * torch.arange(TAPS - 1, -1, -1)[:, None]
        first = ends[user] - lengths[user]
        rows = torch.arange(tokens) - lags
        self.rows = torch.where(rows >= first, rows, tokens)
        self.x = normal((tokens, width), 1.0, seed=2)
        self.grad = normal((tokens, width), 1.0, seed=3)
        self.parameters = {
            "weight": normal((width, width, TAPS), (TAPS * width) ** -0.5, seed=4),
            "bias": normal((width,), 0.1, seed=5),
            "norm_weight": 1 + normal((width,), 0.1, seed=6),
            "norm_bias": normal((width,), 0.1, seed=7),
        }

    def leaves(self, x: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Fresh leaves, by name, the input among them."""
        named = {"input": x, **self.parameters}
        return {name: own.detach().to(dtype, copy=True).requires_grad_(self.backward) for name, own in named.items()}

    @functools.cached_property
    def padded(self) -> Tensor:
        """(users, LENGTH, d), zeros where there is no item."""
        out = self.x.new_zeros(self.num_users * LENGTH, self.x.shape[1])
        return out.index_copy(0, self.places, self.x).view(self.num_users, LENGTH, -1)


Layer = Callable[[Problem, dict[str, Tensor]], Tensor]


def ours(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    parameters = {name: leaves[name] for name in PARAMETERS}
    return functional.conv_norm_relu(leaves["input"], problem.rows, **parameters, eps=EPS)


def norm_relu(conv: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    return F.relu(F.layer_norm(conv, conv.shape[-1:], leaves["norm_weight"], leaves["norm_bias"], EPS))


def linear(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    x, tokens = leaves["input"], problem.rows.shape[1]
    taken = F.pad(x, (0, 0, 0, 1)).index_select(0, problem.rows.T.flatten()).view(tokens, -1)
    return norm_relu(F.linear(taken, leaves["weight"].transpose(1, 2).flatten(1), leaves["bias"]), leaves)


def conv1d(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    x = F.pad(leaves["input"].transpose(1, 2), ((TAPS - 1) * DILATION, 0))
    return norm_relu(F.conv1d(x, leaves["weight"], leaves["bias"], dilation=DILATION).transpose(1, 2), leaves)


def prepare(layer: Layer, padded: bool = False) -> Callable[[Problem], Prepared]:
    def prepared(problem: Problem) -> Prepared:
        leaves = problem.leaves(problem.padded if padded else problem.x)
        grad = problem.grad
        if padded:
            grad = grad.new_zeros(problem.num_users * LENGTH, grad.shape[1]).index_copy(0, problem.places, grad)
            grad = grad.view(problem.padded.shape)
        last: list[Tensor] = []

        def call() -> None:
            last[:] = [layer(problem, leaves)]
            if problem.backward:
                last[0].backward(grad)

        def at_items(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1).index_select(0, problem.places) if padded else rows

        def results() -> Results:
            found = {"hidden": at_items(last[0].detach())}
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    found[f"d_{name}"] = at_items(leaf.grad) if name == "input" else leaf.grad
            return found

        return Prepared(call, tuple(leaves.values()) if problem.backward else (), results, results)

    return prepared


def work(padded: bool = False) -> Callable[[Problem], Work]:
    def model(problem: Problem) -> Work:
        width, passes = problem.setting.case.width, 3 if problem.backward else 1
        rows = problem.num_users * LENGTH if padded else problem.setting.case.tokens
        numbers = (5 if problem.backward else 2) * rows * width + passes * TAPS * width**2
        return Work(passes * 2.0 * rows * TAPS * width**2, 0.0, FLOAT_BYTES * float(numbers))

    return model


def float32_only(setting: Setting) -> str:
    return "" if setting.dtype == "float32" else "the op has no autocast rule"


def ours_in(isa: str) -> Provider:
    missing = missing_isa(isa, "conv_norm_relu")
    return Provider(
        f"cprec-{isa}",
        prepare(ours),
        work(),
        scope=functools.partial(forced_isa, isa),
        missing=lambda setting: float32_only(setting) or missing(setting),
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider("reference", prepare(ours), work(), scope=plain_torch, missing=float32_only),
    Provider("torch-linear", prepare(linear), work()),
    Provider("torch-conv1d", prepare(conv1d, padded=True), work(padded=True)),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """Plain torch in "float64", or in a dtype of DTYPES."""
    leaves = problem.leaves(problem.x, torch.float64 if dtype == "float64" else torch.float32)
    hidden = linear(problem, leaves)
    if not problem.backward:
        return {"hidden": hidden}
    gradients = torch.autograd.grad(hidden, list(leaves.values()), problem.grad.to(hidden.dtype))
    found = {f"d_{name}": own for name, own in zip(leaves, gradients, strict=True)}
    return {"hidden": hidden.detach()} | found


OP = Op(
    "conv_norm_relu",
    "a layer of NextItNet's blocks over items without padding",
    modes=("fwd_bwd", "fwd"),
    cases=tuple(f"100k-d{width}-t{tokens}" for width in (64, 128, 256) for tokens in (512, 4096)),
    baseline="torch-linear",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
)
