"""What a client does with a message, wherever it runs: content in, content out."""

import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import MessageType, RecordDict

from fedtune.config.compatibility import tells_its_work, traits_of
from fedtune.config.population import MEASURED
from fedtune.core.errors import MALFORMED, CapacityError, ClientError, ConfigError, WireError
from fedtune.core.limits import BOUNDS
from fedtune.core.protocol import UNLIMITED, ClientInfo, DeviceProfile, InSteps, Instruction, Score, Update, grid
from fedtune.core.seeds import derive_seed
from fedtune.core.text import first_line
from fedtune.data.federated_data import ClientBatches
from fedtune.device.home import home
from fedtune.device.owner import Owner
from fedtune.device.usage import Usage
from fedtune.planning.population import profile_of
from fedtune.planning.turn_times import memory_of, trained_of
from fedtune.training.apply_instruction import BATCH, BITS, STEPS, with_steps
from fedtune.training.cohort import together
from fedtune.training.gradients import finished
from fedtune.training.schedule import schedule_of
from fedtune.wire.flower_private import content_bytes
from fedtune.wire.messages import pack_greeting, pack_score, unpack_question
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.uplink import Uplink
from fedtune.workspace.workspace import Workspace, workspace_of

# What a node's owner may declare of it, in Flower's spelling of keys
LIMITS = {name.replace("_", "-"): name for name in DeviceProfile.__dataclass_fields__}


@dataclass(frozen=True)
class Handled:
    """An answer, and how long its training took."""

    content: RecordDict
    training_seconds: float = 0.0


def handle_message(
    kind: str,
    round: str,
    content: RecordDict,
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
    owner: Owner | None = None,
) -> Handled:
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
    usage = None if owner is None else Usage(home(), owner.file.limits)
    try:
        if usage is not None:
            (usage.begin if kind == MessageType.TRAIN else usage.count)(content_bytes(content))
        handled = _answer(kind, round, content, workspace_of(run_config, owner), node_config)
        if usage is not None:
            usage.count(content_bytes(handled.content))
        return handled
    except MALFORMED as error:
        if owner is None:
            raise
        # What a hostile message can make fail is without end, and the reason is the same
        reason = first_line(error)[:200]
        raise ClientError(f"what the server asks for can't be done here: {type(error).__name__}: {reason}") from error


def handle_together(
    messages: Sequence[tuple[str, RecordDict]],
    run_config: Mapping[str, Any],
    node_configs: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> list[Handled | Exception]:
    """Answer the training messages of several clients, who are trained at once where that can be: what each answers, in
    their order, or what it raised.

    Args:
        messages: group id and content of each.
        node_configs: of the nodes that they are for.
        say: takes what a person should know.
    """
    workspace = workspace_of(run_config)
    answers: dict[int, Handled | Exception] = {}
    beside: dict[int, InSteps[Handled]] = {}
    for place, ((round, content), node_config) in enumerate(zip(messages, node_configs, strict=True)):
        try:
            asked = _asked(round, content, workspace, index_of(node_config))
            if workspace.stacks(asked.told):
                beside[place] = take_turn(workspace, asked, beside=True)
            else:
                answers[place] = finished(take_turn(workspace, asked))
        except Exception as error:  # this client's own
            answers[place] = error
    answers |= dict(zip(beside, together(list(beside.values()), say), strict=True))
    return [answers[place] for place in range(len(messages))]


def _answer(
    kind: str, round: str, content: RecordDict, workspace: Workspace, node_config: Mapping[str, Any]
) -> Handled:
    own = workspace.owner.index if workspace.owner is not None else None
    index, downlink = index_of(node_config) if own is None else own, Downlink(workspace)
    if kind == MessageType.QUERY:
        return Handled(_greeting(content, workspace, downlink, index, node_config))
    if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
        raise WireError(f"message type {kind[:40]!r} is not known: expected query, train or evaluate")
    if kind == MessageType.EVALUATE:
        number = _number(round)
        instruction, run = downlink.decode(content, index, number + 1)
        return Handled(pack_score(evaluate_client(workspace, run, index, number, instruction)))
    return finished(take_turn(workspace, _asked(round, content, workspace, index)))


def _number(round: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", round):
        raise WireError(f"expected the round's number as the message's group, got {round[:40]!r}")
    return int(round)


def _asked(round: str, content: RecordDict, workspace: Workspace, index: int) -> "Assignment":
    number = _number(round)
    instruction, run = Downlink(workspace).decode(content, index, number, number)
    return Assignment(run, index, number, instruction)


def _greeting(
    content: RecordDict, workspace: Workspace, downlink: Downlink, index: int, node_config: Mapping[str, Any]
) -> RecordDict:
    run, before = unpack_question(content)
    version, heard, lost = downlink.held(run, index, before) if run else (0, 0, False)
    own = home() if workspace.experiment.population.devices == MEASURED else None
    capability = capability_of(node_config, profile_of(index, workspace.experiment, own))
    data = workspace.data
    name, tokens = (data.names[index], data.tokens(index)) if data.names else ("", 0)
    peer = ClientInfo(
        index, workspace.samples(index), capability, base_version=version, broadcast=heard, name=name, tokens=tokens
    )
    return pack_greeting(peer, workspace.model.layout.sha256, workspace.data.sha256, lost)


@dataclass(frozen=True)
class Assignment:
    """What a client is to do in a round.

    Attributes:
        run: the run's id, under which what the client keeps is found.
        told: what the server asks for.
    """

    run: str
    index: int
    round: int
    told: Instruction


def take_turn(workspace: Workspace, asked: Assignment, beside: bool = False) -> InSteps[Handled]:
    """A client does its part of a round: its update as it is sent.

    Args:
        beside: others are trained at the same time, so it needs a model with tensors of its own.
    """
    run, index, round = asked.run, asked.index, asked.round
    before = workspace.client_states.load(run, index, round) if grid(workspace.codec_up) else {}
    update, seconds = yield from _train(workspace, asked, beside)
    return Handled(Uplink(workspace).encode(update, run, index, round, asked.told, before), seconds)


def local_update(workspace: Workspace, run: str, index: int, round: int, instruction: Instruction) -> Update:
    """Client `index` trains, on a model that holds nothing of the client before.

    Args:
        run: the run's id, under which what the client keeps is found.
    """
    return finished(_train(workspace, Assignment(run, index, round, instruction), beside=False))[0]


def _train(workspace: Workspace, asked: Assignment, beside: bool) -> InSteps[tuple[Update, float]]:
    run, index, round, instruction = asked.run, asked.index, asked.round, asked.told
    experiment = workspace.experiment
    key = derive_seed(experiment.seed, "train", round, index)
    memory = workspace.client_states.load(run, index, round)
    model = workspace.install(instruction, memory, beside)
    settings = instruction.settings
    train = experiment.train
    size = int(settings.get(BATCH, train.batch_size))
    batches = workspace.data.batches(index, size, key, train.micro_batch_size)
    own = workspace.data.heldout[index]
    found = workspace.score(own, model.root.adopt(model)) if experiment.evaluate.clients and len(own) else None
    client = with_steps(workspace.client, train, settings, batches.examples)
    if train.epochs is not None and client.steps > (most := BOUNDS[STEPS][1]):
        raise ClientError(f"train.epochs={train.epochs:g} are {client.steps:g} steps here: at most {most} are taken")
    if (schedule := schedule_of(experiment, round)) is not None:
        client = replace(client, schedule=schedule)
    if workspace.owner is not None:
        batches = _within_limits(workspace, client, batches, instruction)
    begun = time.perf_counter()
    training = client.train(model, batches, instruction, memory, key)
    update: Update = (yield from training) if isinstance(training, Generator) else training
    seconds = time.perf_counter() - begun
    if memory:
        workspace.client_states.save(run, index, round, memory)
    if found is not None:
        scores = {"client_eval_loss": found.loss, "client_eval_accuracy": found.accuracy}
        update = replace(update, metrics={**update.metrics, **scores})
    return update, seconds


def _within_limits(workspace: Workspace, client: Any, batches: ClientBatches, told: Instruction) -> ClientBatches:
    """The batches of a turn that the device's owner allows, which end when its time is up.

    Raises:
        CapacityError: if the owner doesn't.
    """
    owner = workspace.owner
    assert owner is not None
    limits = owner.file.limits
    if limits.seconds is not None:
        batches = replace(batches, seconds=limits.seconds)
    if (limits.steps, limits.examples, limits.memory_bytes) == (None, None, None):
        return batches
    if not tells_its_work(client):
        raise CapacityError(
            f"{type(client).__name__} doesn't say what a turn takes (it has no `work`), and this device's owner has "
            "set limits (device.toml)"
        )
    work = client.work(told.settings)
    passes = max(1, round(work.forward)) if not work.backward else 1
    size = min(batches.batch_size, batches.examples)
    memory = 0.0
    if limits.memory_bytes is not None:
        partial = traits_of(workspace.strategy).partial
        trained = trained_of(workspace.model, workspace.weight_of, workspace.costs, told, partial=partial)
        held, micro = int(told.settings.get(BITS, workspace.bits)), workspace.experiment.train.micro_batch_size
        memory = memory_of(workspace.costs, work, trained, size, micro, held)
    owner.check_turn(work.steps, work.steps * passes * size, memory)
    return batches


def evaluate_client(workspace: Workspace, run: str, index: int, round: int, instruction: Instruction) -> Score | None:
    """Score what client `index` holds after `round` on its own held-out data; None if it has none."""
    own = workspace.data.heldout[index]
    if not len(own):
        return None
    memory = workspace.client_states.load(run, index, round + 1)
    return workspace.evaluate_all(own, workspace.install(instruction, memory))


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
