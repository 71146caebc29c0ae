"""Who takes part in a round."""

import numpy as np

from fedtune.keys import fold, permutation


def sample_cohort(clients: int, cohort: int, seed: int, round: int) -> list[int]:
    """The indices that take part in `round`, ascending: uniform, without repetition.

    A function of the seed and the round alone, so it is the same after a resume and whatever ids Flower gives to nodes.
    """
    chosen = permutation(fold(seed, "cohort", round), clients)[:cohort]
    return [int(index) for index in np.sort(chosen)]
