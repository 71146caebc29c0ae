"""What playing and evaluating a round takes, whichever way a run's rounds are played."""

from dataclasses import dataclass

from fedtune.runs.run_folder import RunFolder
from fedtune.server.aggregation import Aggregator
from fedtune.server.client_channel import ClientChannel
from fedtune.server.eligibility import Eligibility
from fedtune.server.progress import View
from fedtune.server.state import ServerState
from fedtune.server.virtual_clock import Clock
from fedtune.workspace.workspace import Workspace


@dataclass(frozen=True)
class RoundParts:
    """One run's."""

    workspace: Workspace
    channel: ClientChannel
    eligibility: Eligibility
    aggregator: Aggregator
    clock: Clock
    known: ServerState
    folder: RunFolder
    view: View
