"""Training of sparse models: SquareHead distillation and pruning schedules, for any loop and for Trainer."""
