"""What a server knows from round to round: all that a checkpoint keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedtune.core.protocol import ClientInfo
from fedtune.runs.checkpoint import Checkpoint, Progress, state_sha256
from fedtune.wire.broadcast_chain import BroadcastChain


@dataclass
class ServerState:
    """One run's.

    Attributes:
        strategy_state: the strategy's.
        sent: the last broadcast, where broadcasts build on one another.
        progress: virtual time, who is uncertain, what is pending.
        run_id: by which clients find what they kept; a resumed run has the one it began with.
        done: the last finished round; -1 if not even round 0 is.
        sha256: of the strategy's state after it.
    """

    strategy_state: Any = None
    sent: BroadcastChain = field(default_factory=BroadcastChain)
    progress: Progress = field(default_factory=Progress)
    run_id: str = ""
    done: int = -1
    sha256: str = ""

    @classmethod
    def restored(cls, checkpoint: Checkpoint) -> "ServerState":
        """The state that a checkpoint keeps."""
        kept = (checkpoint.state, checkpoint.sent, checkpoint.progress, checkpoint.run, checkpoint.round)
        return cls(*kept, sha256=state_sha256(checkpoint.state))

    def checkpoint(
        self, number: int, config_sha256: str, data: dict[str, Any], peers: Mapping[int, ClientInfo]
    ) -> Checkpoint:
        """What is kept when round `number` ends."""
        # Who has said since what it keeps is known
        unsure = [
            i for i in self.progress.state_unknown if i in peers and not (peers[i].broadcast or peers[i].base_version)
        ]
        self.progress = replace(self.progress, state_unknown=unsure)
        return Checkpoint(number, config_sha256, self.strategy_state, self.run_id, self.sent, self.progress, data)

    def trust(self, index: int, sure: bool) -> None:
        """Remember whether it is known what a client keeps. It is asked after a resume too, and says what it keeps, but
        not of which round: so who is to be sent everything is remembered."""
        if sure is (index in self.progress.state_unknown):
            others = {other for other in self.progress.state_unknown if other != index}
            self.progress = replace(self.progress, state_unknown=sorted(others if sure else others | {index}))
