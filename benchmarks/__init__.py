"""Benchmarks: one file per question; each prints a table and, as its last line, JSON.

`results/` keeps what was measured, with machine and date.
"""
