"""What a packet asks of a client, in the tensors that it trains: those of its own rank where clients
have unequal ones. No torch.
"""

from dataclasses import dataclass

from fedtune.algorithms.units import Limits, blocks_of, selected, unlimited
from fedtune.bundles.bundle import Bundle
from fedtune.errors import Refused
from fedtune.types import Arrays
from fedtune.wire import Packet, held_of, kind_of, require_whole, round_of, trained_of


@dataclass(frozen=True)
class Asked:
    """`rank`: of the client's cores; 0: adapter.rank. `model`: the tensors of a client of this rank, or
    what else travels. `names`: those to be trained; None: all.
    """

    rank: int
    model: Arrays
    names: tuple[str, ...] | None


def asked(bundle: Bundle, packet: Packet) -> Asked:
    """Raises Refused for a packet that is not the whole model of a client of the job."""
    if bundle.ranks is None:
        require_whole(packet)
        return Asked(0, packet.arrays, packet.train)
    rank = bundle.ranks.rank_of(packet)
    return Asked(
        rank,
        bundle.ranks.join(packet.arrays, rank),
        None if packet.train is None else bundle.ranks.trained(packet.train, rank),
    )


def require_borne(bundle: Bundle, payload: bytes, limits: Limits) -> None:
    """Raises Refused for a packet that asks for more than a client of these limits bears: other blocks than
    its own, more of them or deeper ones where they are chosen by scores, a probe of blocks that it cannot
    reach, or cores of a higher rank.
    """
    job, schema, kind = bundle.job, bundle.schema, kind_of(payload)
    if kind not in ("model", "probe"):
        return
    rank = max((t.rank for t in held_of(payload, schema).tensors), default=0)
    if limits.rank and rank > limits.rank:
        raise Refused("class", f"holds cores of rank {rank}, a client of this class has {limits.rank}")
    if kind == "probe":
        if not unlimited(schema, limits.depth):
            raise Refused(
                "class",
                f"asks about all {len(schema.blocks)} blocks, a client of this class goes down "
                f"to the last {limits.depth}",
            )
        return
    wanted = trained_of(payload, schema).units
    if not job.units.probes:
        own = selected(job, schema, round_of(payload), limits.blocks)
        if beyond := [unit for unit in wanted if unit not in own]:
            raise Refused(
                "class",
                (
                    f"asks for {beyond[0]} to be trained in round {round_of(payload)}, "
                    f"where a client of this class trains {', '.join(own)}"
                )[:300],
            )
        return
    blocks = [place for place, unit in enumerate(schema.blocks) if unit in wanted]
    most, depth = blocks_of(job, schema, limits.blocks), limits.depth or len(schema.blocks)
    if len(blocks) > most:
        raise Refused(
            "class", f"asks for {len(blocks)} blocks to be trained, a client of this class trains {most}"
        )
    if blocks and len(schema.blocks) - blocks[0] > depth:
        raise Refused(
            "class",
            f"asks for {schema.blocks[blocks[0]]} to be trained, a client of this class "
            f"goes down to the last {depth}",
        )


def answered(bundle: Bundle, arrays: Arrays) -> Arrays:
    """What a client trained, of its rank, as it travels."""
    return arrays if bundle.ranks is None else bundle.ranks.split(arrays)
