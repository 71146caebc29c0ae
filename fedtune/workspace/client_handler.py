"""What a client does with a message, wherever it runs: content in, content out."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.app import MessageType, RecordDict

from fedtune.config.population import MEASURED
from fedtune.core.errors import MALFORMED, ClientError, ConfigError, WireError
from fedtune.core.protocol import UNLIMITED, ClientInfo, DeviceProfile
from fedtune.device.owner import Owner
from fedtune.planning.population import profile_of
from fedtune.training.client_state import home
from fedtune.wire.messages import pack_greeting, pack_score, unpack_question
from fedtune.workspace.workspace import Party, party_of

# What a node's owner may declare of it, in Flower's spelling of keys
LIMITS = {name.replace("_", "-"): name for name in DeviceProfile.__dataclass_fields__}


def take_turn(
    kind: str,
    round: str,
    content: RecordDict,
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
    owner: Owner | None = None,
) -> RecordDict:
    """Answer a message.

    Args:
        kind: `query` asks who this is, `train` for an update, `evaluate` how good the client's own model is.
        round: the message's group id.
        run_config: the run's, which holds the experiment.
        node_config: the node's own: `partition-id`, and what limits it.
        owner: whose device this is, where the run is another's; None: both are this user's.

    Raises:
        FedtuneError: if this client can't do its part.
    """
    try:
        return _answer(kind, round, content, party_of(run_config, owner), node_config)
    except MALFORMED as error:
        if owner is None:
            raise
        # What a hostile message can make fail is without end, and the reason is the same
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ClientError(f"what the server asks for can't be done here: {type(error).__name__}: {reason}") from error


def _answer(kind: str, round: str, content: RecordDict, workspace: Party, node_config: Mapping[str, Any]) -> RecordDict:
    index = index_of(node_config)
    if kind == MessageType.QUERY:
        run, before = unpack_question(content)
        version, heard, lost = workspace.holds(run, index, before) if run else (0, 0, False)
        own = home() if workspace.experiment.population.devices == MEASURED else None
        capability = capability_of(node_config, profile_of(index, workspace.experiment, own))
        peer = ClientInfo(index, workspace.samples(index), capability, base_version=version, heard=heard)
        return pack_greeting(peer, workspace.model.layout.sha256, workspace.data.sha256, lost)
    if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
        raise WireError(f"message type {kind[:40]!r} is not known: expected query, train or evaluate")
    if not re.fullmatch(r"[0-9]{1,18}", round):
        raise WireError(f"expected the round's number as the message's group, got {round[:40]!r}")
    number = int(round)
    if kind == MessageType.EVALUATE:
        instruction, run = workspace.hear(content, index, number + 1)
        return pack_score(workspace.examine(run, index, number, instruction))
    instruction, run = workspace.hear(content, index, number, number)
    return workspace.answer(run, index, number, instruction)


def index_of(node_config: Mapping[str, Any]) -> int:
    """The client's index.

    Raises:
        ConfigError: if the node has none.
    """
    try:
        return int(node_config["partition-id"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "this node has no partition-id: start it with --node-config 'partition-id=0 num-partitions=...'"
        ) from error


def capability_of(node_config: Mapping[str, Any], assigned: DeviceProfile | None = None) -> DeviceProfile:
    """What a node can do.

    Args:
        node_config: what its owner declares, which goes first.
        assigned: what it is where its owner says nothing; None: without limits.

    Raises:
        ConfigError: for a limit that isn't a number above zero, or a label that is none.
    """
    declared = {LIMITS[key]: value for key, value in node_config.items() if key in LIMITS}
    able = assigned or UNLIMITED
    try:
        return replace(able, **declared) if declared else able
    except ValueError as error:
        raise ConfigError(f"--node-config: {error}") from error
