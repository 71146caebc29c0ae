"""The Flower app: one ServerApp and one ClientApp, whatever they run on.

Both ends read the same experiment from the run config (`config`: the whole text, or `overrides`: the words that compose
it), so nothing else has to agree. Nothing heavy is imported before a message asks for it: on a device the ClientApp
lives for one message, and a worker that stays does the rest.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp


def make_client_app(config: str | None = None) -> ClientApp:
    """The client's side, for runtimes whose processes stay: all work is done in this one.

    Args:
        config: the experiment's text, for runtimes that hand clients no run config.
    """

    def answer(message: Message, context: Context) -> RecordDict:
        from fedtune.workspace.client_handler import handle_message

        run_config = {"config": config} if config else context.run_config
        at = message.metadata
        return handle_message(at.message_type, at.group_id, message.content, run_config, context.node_config).content

    return _client_app(answer)


def answer_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[RecordDict | Exception]:
    """What the client app above answers to training messages of several clients, who are trained at once where that can
    be."""
    from fedtune.workspace.client_handler import Handled, handle_together

    told = [(message.metadata.group_id, message.content) for message in messages]
    nodes = [context.node_config for context in contexts]
    found = handle_together(told, contexts[0].run_config, nodes, lambda line: print(line, file=sys.stderr))
    return [each.content if isinstance(each, Handled) else each for each in found]


def cohort_of(run_config: Mapping[str, Any]) -> int:
    """How many clients of a run are trained at once, in this process."""
    from fedtune.workspace.workspace import workspace_of

    return workspace_of(run_config).cohort


def make_device_app() -> ClientApp:
    """The client's side, for devices: the work is done by a worker that stays on the node."""

    def answer(message: Message, context: Context) -> RecordDict:
        from fedtune.runtime.worker import ask

        return ask(message, context)

    return _client_app(answer)


def _client_app(answer: Callable[[Message, Context], RecordDict]) -> ClientApp:
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    return app


def make_server_app(
    config: str | None = None, resume: str | None = None, stop: Event | None = None, deployed: bool = False
) -> ServerApp:
    """The server's side.

    Args:
        config: as for `make_client_app`.
        resume: the run folder to go on with; the run config may name it as well.
        stop: set it to interrupt the run, where Ctrl-C can't reach the thread that it runs in.
        deployed: the run config came over the wire.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedtune.device.owner import user
        from fedtune.server.round_loop import run
        from fedtune.workspace.workspace import workspace_of

        run_config = {"config": config} if config else context.run_config
        folder = resume or str(context.run_config.get("resume", "")) or None
        run(grid, workspace_of(run_config, user() if deployed else None), folder, stop)

    return app


client_app = make_device_app()
server_app = make_server_app(deployed=True)
