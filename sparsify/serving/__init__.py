"""Many adapters over one base that is never written to: each row of a batch computes with its own (`sparsify.serve`).

host      `serve`, the host's forward and generate with `adapter_names=`, the handle    names     words for adapters, folders
targets   which weights can take an addend, in original names and coordinates           addends   an adapter as table content
modules   linears that add what the rows' adapters add                                  route     which row has which slot
store     registry, disk → host memory → slots, the loader, leases                      slots     the flat tensors and the table
"""
