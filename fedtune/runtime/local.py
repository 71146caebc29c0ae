"""Every client in this process: an in-process Flower Grid.

Clients take turns over one base model, some at once, so memory does not grow with their number. Messages are Flower's
own. Those of a broadcast share one content, which the ClientApp must only read; ours hands a client tensors and
settings decoded anew for each, so no client can reach what another gets.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.config.schema import Experiment
from fedtune.core.errors import RunFolderError
from fedtune.core.seeds import derive_seed
from fedtune.runs.run_folder import settled
from fedtune.runtime.app import answer_together, cohort_of, make_client_app, make_server_app
from fedtune.wire.flower_private import SERVER_NODE, Error, ErrorCode, Run, assume_identity, set_message_id

RUN_ID = derive_seed(0, "local run")  # as long as Flower's own, so that a message here is as long as one there

Together = Callable[[Sequence[Message], Sequence[Context]], list[RecordDict | Exception]]


class LocalGrid(Grid):
    """A Grid whose nodes are calls of a ClientApp.

    A message is worked on when its reply is pulled, one per pull, in the order pushed: the server sees each reply as
    soon as it is there, and holds one at a time. Training messages that wait together are worked on together, as many
    as the run's workspace says, and then as many replies are held.

    Attributes:
        turn_seconds: what the turn of the last reply took: its share, where it was worked on with others.

    Args:
        together: answers the training messages of several clients; None: one by one.
    """

    takes_turns = True

    def __init__(self, client_app: ClientApp, clients: int, run_config: UserConfig, together: Together | None = None):
        self._together = together
        self._ready: dict[str, tuple[Message, float]] = {}  # replies, and their turns' seconds
        self.turn_seconds = 0.0
        assume_identity(RUN_ID)
        self._client_app = client_app
        self._run_config = dict(run_config)
        self._run = Run.create_empty(RUN_ID)
        self._contexts = {
            (node_id := derive_seed(0, "local node", index)): Context(
                run_id=RUN_ID,
                node_id=node_id,
                node_config={"partition-id": index, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(clients)
        }
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._sent = 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            # Flower's ids are 64 characters, and a reply repeats the id
            message_id = f"{self._sent:064x}"
            set_message_id(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if message_id in self._waiting:
                self._work_on(message_id)
            if message_id in self._ready:
                reply, self.turn_seconds = self._ready.pop(message_id)
                return [reply]
        return []

    def _work_on(self, message_id: str) -> None:
        """Have the reply to this message ready, and those to others that are worked on with it."""
        begun = time.perf_counter()
        message = self._waiting.pop(message_id)
        beside = {message_id: message}
        if self._together is not None and message.metadata.message_type == MessageType.TRAIN:
            most = cohort_of(self._run_config)
            for other, waiting in list(self._waiting.items()):
                if len(beside) >= most:
                    break
                if waiting.metadata.message_type == MessageType.TRAIN:
                    beside[other] = self._waiting.pop(other)
        contexts = [self._contexts.get(each.metadata.dst_node_id) for each in beside.values()]
        if self._together is None or len(beside) == 1 or None in contexts:
            replies = [self._answer(each) for each in beside.values()]
        else:
            found = self._together(list(beside.values()), [context for context in contexts if context is not None])
            replies = [_reply(each, answer) for each, answer in zip(beside.values(), found, strict=True)]
        seconds = (time.perf_counter() - begun) / len(beside)
        self._ready.update({key: (reply, seconds) for key, reply in zip(beside, replies, strict=True)})

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = dict.fromkeys(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            for reply in self.pull_messages(waiting):
                del waiting[reply.metadata.reply_to_message_id]
                replies.append(reply)
        return replies

    def _answer(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            reason = f"there is no node {message.metadata.dst_node_id}"
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
        try:
            return self._client_app(message=message, context=context)
        except Exception as error:
            return _reply(message, error)


def _reply(message: Message, answer: RecordDict | Exception) -> Message:
    if isinstance(answer, RunFolderError):  # the disk that a client's memory is on is the run's own
        raise answer
    if isinstance(answer, Exception):  # whatever a client raises is the server's to book, not the end of the run
        reason = f"{type(answer).__name__}: {answer}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return Message(answer, reply_to=message)


def server_context(run_config: UserConfig) -> Context:
    """What a ServerApp on a `LocalGrid` is started with."""
    return Context(run_id=RUN_ID, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)


def run_local(experiment: Experiment, resume: str | None = None) -> Path:
    """Run the whole experiment in this process; returns the run's folder."""
    with settled(experiment, resume) as experiment:
        run_config: UserConfig = {"config": experiment.text()}
        grid = LocalGrid(make_client_app(), experiment.population.clients, run_config, answer_together)
        make_server_app(resume=resume)(grid=grid, context=server_context(run_config))
        return Path(str(experiment.out)).expanduser()
