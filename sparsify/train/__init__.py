"""Training: groups for optimizers, RoSA's schedule, SquareHead distillation, pruning schedules; for any loop and for Trainer."""

from sparsify.modules.decay import keep_out_of_decay, param_groups
from sparsify.ops.chunked_loss import chunked_cross_entropy
from sparsify.train.checkpoints import adapter_checkpoints, last_checkpoint

__all__ = ["adapter_checkpoints", "chunked_cross_entropy", "keep_out_of_decay", "last_checkpoint", "param_groups"]
