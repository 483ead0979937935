"""Pruning: patterns and masks, SparseGPT, Wanda, magnitude, random, and the driver that walks a model layer by layer."""
