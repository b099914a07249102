"""Which of our ops ran."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class CalledOps(TorchDispatchMode):
    """Within, the names of all ops of ``cprec`` that are called, backward passes included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cprec":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        """How often an op was called."""
        return self.names.count(name)
