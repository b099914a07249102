"""What the row-wise optimizers share: gradients as rows, checks before changes, and weight decay that waits for a row.

Decoupled weight decay (arXiv 1711.05101) multiplies a whole table by 1 - lr_s wd in every step s. Here a row is
multiplied when something is done to it. A parameter keeps L_t = sum over its sparse steps s <= t of log(1 - lr_s wd), and
every row the value l of L up to which it was decayed: exp(L_t - l) is the product it has missed, whatever the learning
rates were. Both are fp64, so that 10^8 steps lose nothing that fp32 would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..nn import BlockEmbedding
from ..ops import row_optimizer as ops

Group = dict[str, Any]
# State that is one number per row; other state has the shape of its parameter.
PER_ROW = frozenset({"sum", "row_log_decay"})
# State that is one number per parameter and stays on the host.
COUNTERS = frozenset({"step", "log_decay"})


class Gradient(NamedTuple):
    """A gradient that has been checked: ``values`` (k, ...) of ``rows`` (k,), ascending; of all rows where None."""

    group: Group
    param: Tensor
    rows: Tensor | None
    values: Tensor


class PendingDecay(NamedTuple):
    """Weight decay of one step: lr * wd, L before and after it, and per row how much of L it has had (None: all)."""

    rate: float
    log_decay: tuple[float, float]
    rows: Tensor | None


class RowwiseOptimizer(torch.optim.Optimizer):
    """Base of the row-wise optimizers. A subclass gives the fields of its state and the step of one gradient."""

    required_state: frozenset[str]
    # Whether torch's optimizer of this name adds its weight decay to the gradient.
    torch_is_coupled = False

    # What a subclass gives

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for a hyperparameter out of range. Subclasses add theirs."""
        check_range("lr", group["lr"])
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        check_range("eps", group["eps"])
        check_range("weight_decay", weight_decay)
        if not lr * weight_decay < 1:
            raise ValueError(
                f"lr * weight_decay = {lr} * {weight_decay} must be below 1: a step would turn the parameters around"
            )

    def _new_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        """Moments of a parameter that has not been stepped yet."""
        raise NotImplementedError

    def _learning_rate(self, group: Group, step: int) -> float:
        """Learning rate of a parameter's step, counted from 1."""
        return float(group["lr"])

    def _apply(self, gradient: Gradient, state: dict[str, Tensor], step: int, lr: float, decay: PendingDecay) -> None:
        """Do one step."""
        raise NotImplementedError

    # Steps

    def add_param_group(self, param_group: Group) -> None:
        """As in torch.

        Raises:
            TypeError: a parameter that is not a dense tensor of a floating dtype, or is sharded (a DTensor).
            ValueError: a hyperparameter out of range. The optimizer is unchanged then.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                if hasattr(param, "device_mesh"):
                    raise TypeError(
                        f"parameters must be plain tensors, got a {type(param).__name__} (FSDP2 or tensor parallel): keep the "
                        "module out of fully_shard, or train these parameters by torch.optim.AdamW"
                    )
                if not param.is_floating_point() or param.layout != torch.strided:
                    raise TypeError(f"parameters must be dense and floating point, got {param.layout} of {param.dtype}")
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient, dense or sparse over its first dimension.

        Gradients and hyperparameters are checked first, all of them: an exception leaves parameters and state as they
        were. Gradients are not searched for NaN and inf.

        Args:
            closure: evaluates the model anew and returns the loss.

        Raises:
            IndexError: a sparse gradient names a row that is not there.
            TypeError: a gradient whose dtype is not the parameter's; moments of another dtype, as the parameter has changed its.
            ValueError: a gradient of another shape or layout, or sparse in more than one dimension; a learning rate or
                another hyperparameter that has left its range, lr * weight_decay < 1 among them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_group(group)
        gradients = [
            _gradient(group, param)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for gradient in gradients:
            self._check_state(gradient.param)
        for gradient in gradients:
            self._step_one(gradient)
        return loss

    def _check_state(self, param: Tensor) -> None:
        """Raise TypeError for moments that are not of the parameter's kind any more."""
        wanted = ops.state_dtype(param)
        for name, value in self.state.get(param, {}).items():
            if name in self._moments and value.dtype != wanted:
                raise TypeError(
                    f"{name} of a parameter {tuple(param.shape)} is {value.dtype}, and must be {wanted} now that the parameter "
                    f"is {param.dtype}: load this optimizer's own state_dict, which casts it"
                )

    @property
    def _moments(self) -> frozenset[str]:
        return self.required_state - COUNTERS

    def _step_one(self, gradient: Gradient) -> None:
        group, param = gradient.group, gradient.param
        state = self.state[param]
        if not state:
            # On the host: no step waits for a device.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state.update(self._new_state(group, param))
            # Before there is any: torch.distributed.checkpoint loads what a step without gradients makes, and no more.
            if group["weight_decay"] > 0 and param.dim() > 0:
                state.update(_pending_state(param))
        step = int(state["step"]) + 1
        lr = self._learning_rate(group, step)
        decay = self._pending(gradient, state, lr * float(group["weight_decay"]))
        self._apply(gradient, state, step, lr, decay)
        state["step"].fill_(step)
        if decay.rows is not None:
            state["log_decay"].fill_(decay.log_decay[1])

    def _pending(self, gradient: Gradient, state: dict[str, Tensor], rate: float) -> PendingDecay:
        """The decay of this step. A dense gradient brings rows up to date that earlier sparse ones left behind."""
        param = gradient.param
        if gradient.rows is None:
            self._catch_up_all(param)
            return PendingDecay(rate, (0.0, 0.0), None)
        if rate > 0 and "log_decay" not in state:
            state.update(_pending_state(param))
        if "log_decay" not in state:
            return PendingDecay(rate, (0.0, 0.0), None)
        before = float(state["log_decay"])
        return PendingDecay(rate, (before, before + math.log1p(-rate)), state["row_log_decay"])

    # Decay that waits

    @torch.no_grad()
    def catch_up(self, param: Tensor, rows: Tensor) -> None:
        """Apply the weight decay that ``rows`` of ``param`` have missed, before they are read.

        The result of the next :meth:`step` is the same bit for bit, whether its rows were caught up or not: what
        changes is what a forward pass reads, and so the gradient. See the class for what that means.

        Args:
            param: a parameter of this optimizer.
            rows: int64 of any shape, each in 0..len(param)-1, in any order and as often as they come.

        Raises:
            IndexError: a row out of range. TypeError: rows that are not int64.
            ValueError: a parameter of another optimizer.
        """
        state = self._state_of(param)
        if "log_decay" in state:
            torch.ops.cprec.row_decay_(param, rows.reshape(-1), state["row_log_decay"], float(state["log_decay"]))
        else:
            ops.check_rows(param, rows.reshape(-1))

    @torch.no_grad()
    def prepare(self, embedding: BlockEmbedding, ids: Tensor) -> None:
        """:meth:`catch_up` for every row that ``embedding(ids)`` is about to read.

        On a device the host waits for the ids of each table, as it does for those of the sparse gradient.

        Args:
            embedding: its tables may belong to this optimizer or to others, which are left alone.
            ids: (...) int64, as the module takes them. Ids out of range are ignored: the module reports them.

        Raises:
            TypeError: not a BlockEmbedding, or ids that are not int64.
        """
        if not isinstance(embedding, BlockEmbedding):
            raise TypeError(
                f"prepare takes a BlockEmbedding, got {type(embedding).__name__}; catch_up takes any parameter and rows"
            )
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {ids.dtype}; convert with ids.long()")
        offsets = embedding.partition.offsets
        for j, table in enumerate(embedding.embeddings):
            if "log_decay" in self.state.get(table, {}):
                lo, hi = offsets[j], offsets[j] + table.shape[0]
                self.catch_up(table, ids[(ids >= lo) & (ids < hi)] - lo)

    @torch.no_grad()
    def apply_pending_decay(self) -> None:
        """Bring every row of every parameter up to date, in one pass over the tables.

        Call it before the model is evaluated or its ``state_dict`` is used anywhere but in training that goes on with
        this optimizer's ``state_dict``, which holds what is pending.
        """
        for group in self.param_groups:
            for param in group["params"]:
                self._catch_up_all(param)

    def _catch_up_all(self, param: Tensor) -> None:
        state = self.state.get(param, {})
        if "log_decay" not in state or (log_decay := float(state["log_decay"])) == 0:
            return
        torch.ops.cprec.row_decay_(param, None, state["row_log_decay"], log_decay)
        # Nothing is pending, so the sums may start anew and stay short in long runs.
        state["row_log_decay"].zero_()
        state["log_decay"].zero_()

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        if param not in self.state and not any(param is known for known in self._params()):
            raise ValueError(f"the parameter of shape {tuple(param.shape)} is not one of this optimizer's")
        state: dict[str, Tensor] = self.state.get(param, {})
        return state

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; moments are fp32 beside a 16-bit parameter, whatever they were saved as, pending decay is fp64.

        Raises:
            ValueError: the state is not that of this kind of optimizer, of one with amsgrad or weight decay that is not
                decoupled, or of parameters of other shapes. The optimizer is unchanged then.
        """
        final: list[dict[str, Any]] = []
        # The last of the hooks sees what the others have made of the state.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: final.append(self._checked(given)))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = final[0]
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        for index, param in zip(ids, self._params(), strict=True):
            for name, value in saved["state"].get(index, {}).items():
                # torch has cast it to the parameter's dtype, and leaves it in the strides of the one it was saved for.
                dtype = ops.state_dtype(param) if name in self._moments else value.dtype
                device = "cpu" if name in COUNTERS else param.device
                self.state[param][name] = value.to(device, dtype, copy=True).contiguous()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(f"this is not a state of {type(self).__name__}: it has {', '.join(map(str, state_dict))}")
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        # SparseAdam, and Adam of old, count in plain numbers.
        states = {
            index: {
                name: torch.tensor(float(value)) if isinstance(value, int | float) else value
                for name, value in state.items()
            }
            for index, state in state_dict["state"].items()
        }
        for index, param in zip(ids, self._params(), strict=False):  # torch reports differing numbers
            state = states.get(index, {})
            if state and not self.required_state <= set(state):
                raise ValueError(
                    f"this is not a state of {type(self).__name__}: it has {', '.join(state)} for parameter {index}, "
                    f"not {', '.join(sorted(self.required_state))}"
                )
            for name, value in state.items():
                if value.dim() and value.shape != (param.shape[:1] if name in PER_ROW else param.shape):
                    raise ValueError(
                        f"{name} of parameter {index} is {tuple(value.shape)}, for a parameter {tuple(param.shape)}"
                    )
        for group in state_dict["param_groups"]:
            # torch adds "differentiable" to the defaults of an optimizer that has loaded a state or was copied.
            if missing := sorted(set(self.defaults) - set(group) - {"differentiable"}):
                raise ValueError(
                    f"this is not a state of {type(self).__name__}: it names no {', '.join(missing)} for a group"
                )
            if group.get("amsgrad"):
                raise ValueError(f"this state is of an optimizer with amsgrad, which {type(self).__name__} has not")
            decoupled = group.get("decoupled_weight_decay", not (self.torch_is_coupled and "foreach" in group))
            if not decoupled and group["weight_decay"]:
                raise ValueError(
                    f"this state is of an optimizer that adds weight_decay = {group['weight_decay']} to the gradient; "
                    f"that of {type(self).__name__} is decoupled: set it to 0 in the state, then choose one anew"
                )
        return {**state_dict, "state": states}


def _pending_state(param: Tensor) -> dict[str, Tensor]:
    """L and what every row has had of it, none yet."""
    return {
        "log_decay": torch.zeros((), dtype=torch.float64, device="cpu"),
        "row_log_decay": torch.zeros(param.shape[0], dtype=torch.float64, device=param.device),
    }


def _gradient(group: Group, param: Tensor) -> Gradient:
    """The gradient of a parameter, checked. Raises as :meth:`RowwiseOptimizer.step`."""
    grad = param.grad
    assert grad is not None
    what = f"the gradient of a parameter {tuple(param.shape)}"
    if grad.dtype != param.dtype:
        raise TypeError(f"{what} is {grad.dtype}, the parameter {param.dtype}")
    if grad.shape != param.shape:
        raise ValueError(f"{what} is {tuple(grad.shape)}")
    if grad.layout == torch.strided:
        return Gradient(group, param, None, grad)
    if grad.layout != torch.sparse_coo:
        raise ValueError(f"{what} is {grad.layout}; dense and sparse_coo are taken")
    if grad.sparse_dim() != 1:
        raise ValueError(f"{what} is sparse in {grad.sparse_dim()} dimensions; rows, the first one alone, are taken")
    rows, values = grad._indices()[0], grad._values()
    ops.check_rows(param, rows)
    if not _ascending(rows, grad):
        # Not grad.coalesce(): it returns the tensor itself where the flag is set, rightly or not.
        grad = torch.sparse_coo_tensor(rows[None], values, grad.shape, check_invariants=False).coalesce()
        rows, values = grad._indices()[0], grad._values()
    return Gradient(group, param, rows, values)


def _ascending(rows: Tensor, grad: Tensor) -> bool:
    """Whether every row comes once, in order. On a device, where looking would wait for it, the flag is trusted."""
    if rows.device.type != "cpu":
        return grad.is_coalesced()
    return bool((rows[1:] > rows[:-1]).all())


def check_range(name: str, value: float | str, below: float = math.inf) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if isinstance(value, str) or not 0 <= value < below:
        limits = "at least 0 and finite" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
