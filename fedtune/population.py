"""Who takes part in a round, and with what."""

import math
from dataclasses import replace

import numpy as np

from fedtune.keys import fold, permutation
from fedtune.protocol import SERVER, Layout, Peer
from fedtune.schema import Experiment


def sample_cohort(clients: int, cohort: int, seed: int, round: int) -> list[int]:
    """The indices that take part in `round`, ascending: uniform, without repetition.

    A function of the seed and the round alone, so it is the same after a resume and whatever ids Flower gives to nodes.
    """
    chosen = permutation(fold(seed, "cohort", round), clients)[:cohort]
    return [int(index) for index in np.sort(chosen)]


def equip(peer: Peer, experiment: Experiment, layout: Layout) -> Peer:
    """The peer with the rank and the scaling of the adapter that it is to train."""
    rank = experiment.population.rank_of(peer.index, experiment.adapter.rank, peer.capability.max_rank)
    if not rank:
        return peer
    return replace(peer, rank=rank, scaling=scaling_at(rank, experiment, layout))


def scaling_at(rank: int, experiment: Experiment, layout: Layout) -> float:
    """alpha / r of an adapter of that rank, or alpha / sqrt(r) for rsLoRA."""
    whole = layout.scaling
    if experiment.population.scaling == "equal":
        return whole
    wider = experiment.adapter.rank / rank
    return whole * (math.sqrt(wider) if experiment.adapter.kind == "rslora" else wider)


def server_peer(experiment: Experiment, layout: Layout) -> Peer:
    """The server as one more client: it holds nothing yet, and can take the widest adapter."""
    if experiment.population.ranks is None:
        return Peer(SERVER, 1)
    return Peer(SERVER, 1, rank=experiment.adapter.rank, scaling=layout.scaling)
