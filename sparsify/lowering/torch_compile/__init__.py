"""The `torch.compile` backend, and its passes over joint graphs."""
