"""Plans that are made once: what devices can choose from lasts for rounds, and many devices are alike."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.core.costs import Costs, Weight
from fedtune.core.protocol import DeviceProfile
from fedtune.planning.knapsack import selections
from fedtune.planning.planner import Plan, Rules, plan

KEPT_OFFERS, KEPT_PLANS = 2, 4096


class Offer:
    """What there is for devices to choose from, and what they chose."""

    def __init__(self, rules: Rules, costs: Costs, weights: Sequence[Weight], values: NDArray[np.floating]):
        """Args:
        values: (weights, ranks), as fedtune.planning.knapsack.selections takes them.
        """
        self._rules, self._costs, self._weights = rules, costs, list(weights)
        self._selections = selections(self._weights, rules.ranks, values, costs.input_bytes, costs.inner_bytes)
        self.plans: dict[DeviceProfile, Plan | str] = {}

    def plans_for(self, devices: Sequence[DeviceProfile]) -> list[Plan | str]:
        """A plan for each, or why it can take no part. Many at once take little longer than one."""
        new = [device for device in dict.fromkeys(devices) if device not in self.plans]
        if len(self.plans) + len(new) > KEPT_PLANS:
            self.plans.clear()
            new = list(dict.fromkeys(devices))
        if new:
            found = plan(self._selections, self._costs, self._weights, self._rules, new)
            self.plans |= zip(new, found, strict=True)
        return [self.plans[device] for device in devices]


_kept: list[tuple[tuple[object, ...], Offer]] = []  # newest last


def offer(made_of: tuple[object, ...], make: Callable[[], Offer]) -> Offer:
    """The offer that was made of these very objects, or a new one. A new one plans for the last one's devices at once:
    who was asked before will be again."""
    for known, old in reversed(_kept):
        if len(known) == len(made_of) and all(one is other for one, other in zip(known, made_of, strict=True)):
            return old
    made: Offer = make()
    if _kept:
        made.plans_for(list(_kept[-1][1].plans))
    _kept.append((made_of, made))
    del _kept[:-KEPT_OFFERS]
    return made
