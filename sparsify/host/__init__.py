"""The host: a program carried back into modules of the user's own classes, and what a user does with it (`model.sparsify`)."""
