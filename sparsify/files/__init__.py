"""Files: one atomic, hashed writer and one reader that validates, for everything that sparsify keeps on disk.

atomic        a file appears whole, or the old one stays; several files appear together
tensors       safetensors files with a content hash of every tensor: written in pieces, checked when read
strict_json   JSON from outside: no duplicates, no NaN, no numbers or depths without bound
regular       only regular files are opened: a FIFO or a device never hangs a reader
kinds         what lies in a folder, and what must not be written beside it
ranks         of several processes one writes, and all of them learn how it went
"""
