"""What the strategy tells each client, made once for each: the clock looks at some before they are sent."""

from typing import Any

from fedtune.core.protocol import ClientInfo, Instruction, Strategy


class Instructions:
    """Those of one round, kept until the next or until the server's state changes."""

    def __init__(self, strategy: Strategy[Any]):
        self._strategy = strategy
        self._of: tuple[Any, int] = (None, -1)
        self._made: dict[int, tuple[ClientInfo, Instruction]] = {}

    def make(self, state: Any, number: int, peer: ClientInfo) -> Instruction:
        """What `peer` is told in round `number`.

        Raises:
            CapacityError: if its device can do nothing of this method.
        """
        if self._of[0] is not state or self._of[1] != number:
            self._of, self._made = (state, number), {}
        known = self._made.pop(peer.index, None)
        return known[1] if known and known[0] == peer else self._strategy.configure(state, number, peer)

    def prepare(self, state: Any, number: int, peer: ClientInfo) -> Instruction:
        """The same, kept until it is sent.

        Raises:
            CapacityError: as `make`.
        """
        instruction = self.make(state, number, peer)
        self._made[peer.index] = (peer, instruction)
        return instruction
