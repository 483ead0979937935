"""Training: groups for optimizers, RoSA's schedule, SquareHead distillation, pruning schedules; for any loop and for Trainer."""

from sparsify.modules.decay import keep_out_of_decay, param_groups

__all__ = ["keep_out_of_decay", "param_groups"]
