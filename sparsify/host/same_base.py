"""Under `fully_shard`, what the first rank knows of the base is what every rank knows.

accelerate's efficient loading gives only the first rank the base's values; on the others a model is compiled whose memory nobody wrote.
The state that is then distributed holds what computes, not what the base holds under the trained parts: that lies beside each part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparsify.calibration.ranks import from_rank, object_from_rank
from sparsify.model.sharded import back_to_pieces

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


def in_pieces(handle: Handle) -> bool:
    """Whether the host is sharded; then its parameters are pieces, and every rank has the first one's base. A collective, once."""
    if not back_to_pieces(handle.host):
        return False
    if not handle.same_base:
        take_the_first_ranks(handle)
        handle.same_base = True
    return True


def take_the_first_ranks(handle: Handle) -> None:
    for part in handle.parts.values():
        for name, value in part.remembered().items():
            setattr(part, name, from_rank(0, value))
        part.base_known = object_from_rank(0, part.base_known)
    tables: tuple[dict[str, Tensor], ...] = (handle.base_full, handle.buffers.base)
    for table in tables:
        for name, value in table.items():
            table[name] = from_rank(0, value)
    handle.hashes = object_from_rank(0, handle.hashes)
