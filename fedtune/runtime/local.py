"""Every client in this process: an in-process Flower Grid.

Clients take turns over one base model, so memory does not grow with their number. Messages are Flower's own. Those of a
broadcast share one content, which the ClientApp must only read; ours hands a client tensors and settings decoded
anew for each, so no client can reach what another gets.
"""

from collections import OrderedDict
from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.config.schema import Experiment
from fedtune.core.errors import RunFolderError
from fedtune.core.seeds import derive_seed
from fedtune.runs.run_folder import settled
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.wire.flower_private import SERVER_NODE, Error, ErrorCode, Run, assume_identity, set_message_id

RUN_ID = derive_seed(0, "local run")  # as long as Flower's own, so that a message here is as long as one there


class LocalGrid(Grid):
    """A Grid whose nodes are calls of a ClientApp.

    A message is worked on when its reply is pulled, one per pull, in the order pushed: the server sees each reply as
    soon as it is there, and holds one at a time.
    """

    takes_turns = True  # a reply's time runs from the end of the turn before it

    def __init__(self, client_app: ClientApp, clients: int, run_config: UserConfig):
        assume_identity(RUN_ID)
        self._client_app = client_app
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
                return [self._answer(self._waiting.pop(message_id))]
        return []

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
        except RunFolderError:  # the disk that a client's memory is on is the run's own
            raise
        except Exception as error:  # whatever a client raises is the server's to book, not the end of the run
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def server_context(run_config: UserConfig) -> Context:
    """What a ServerApp on a `LocalGrid` is started with."""
    return Context(run_id=RUN_ID, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)


def run_local(experiment: Experiment, resume: str | None = None) -> None:
    """Run the whole experiment in this process."""
    with settled(experiment, resume) as experiment:
        run_config: UserConfig = {"config": experiment.text()}
        grid = LocalGrid(make_client_app(), experiment.population.clients, run_config)
        make_server_app(resume=resume)(grid=grid, context=server_context(run_config))
