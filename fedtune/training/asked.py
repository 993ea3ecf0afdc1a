"""What a packet asks of a client, in the tensors that it trains: those of its own rank where clients have unequal ones. No torch."""

from dataclasses import dataclass

from fedtune.bundle import Bundle
from fedtune.types import Arrays
from fedtune.wire import Packet, require_whole


@dataclass(frozen=True)
class Asked:
    """`rank`: of the client's cores; 0: adapter.rank. `model`: the tensors of a client of this rank, or what else travels. `names`: those to be trained; None: all."""

    rank: int
    model: Arrays
    names: tuple[str, ...] | None


def asked(bundle: Bundle, packet: Packet) -> Asked:
    """Raises Refused for a packet that is not the whole model of a client of the job."""
    if bundle.ranks is None:
        require_whole(packet)
        return Asked(0, packet.arrays, packet.train)
    rank = bundle.ranks.rank_of(packet)
    return Asked(rank, bundle.ranks.join(packet.arrays, rank), None if packet.train is None else bundle.ranks.trained(packet.train, rank))


def answered(bundle: Bundle, arrays: Arrays) -> Arrays:
    """What a client trained, of its rank, as it travels."""
    return arrays if bundle.ranks is None else bundle.ranks.split(arrays)
