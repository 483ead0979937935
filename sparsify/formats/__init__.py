"""Formats of packed weights: pack, unpack, and those of other libraries."""
