"""Modules that stand in a host in place of the user's: with trained parts, with masks, with packed weights and their kernels."""
