"""A whole decoder as one generated call a token: recognised in the program's graph, bound to a host, run instead of its forward."""
