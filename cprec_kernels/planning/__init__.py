"""Planning partitions from item counts: clusters, cutoffs and ranks under a budget (docs/planning.md)."""

from .costs import CPU, GPU, Machine
from .planner import BudgetError, Objective, Plan, Planner, Prediction, default_ranks, plan
from .quality import QualityModel

__all__ = [
    "CPU",
    "GPU",
    "BudgetError",
    "Machine",
    "Objective",
    "Plan",
    "Planner",
    "Prediction",
    "QualityModel",
    "default_ranks",
    "plan",
]
