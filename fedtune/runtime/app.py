"""The Flower app: one ServerApp and one ClientApp, whatever they run on.

Both ends read the same experiment from the run config (`config`: the whole text, or `overrides`: the words that compose
it), so nothing else has to agree.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import ConfigError
from fedtune.keys import fold
from fedtune.party import Party, party_of
from fedtune.rounds import run
from fedtune.wire import pack_greeting, pack_update, unpack_instruction


def make_client_app(config: str | None = None) -> ClientApp:
    """The client's side.

    Args:
        config: the experiment's text, for runtimes that hand clients no run config.
    """
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        party, index = _who(context, config)
        return Message(pack_greeting(index, party.samples(index), party.model.layout.sha256), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        party, index = _who(context, config)
        round = int(message.metadata.group_id)
        update = party.turn(index, round, unpack_instruction(message.content, party.codec_down))
        key = fold(party.experiment.seed, "up", round, index)
        return Message(pack_update(update, party.codec_up, key), reply_to=message)

    return app


def make_server_app(config: str | None = None, resume: str | None = None) -> ServerApp:
    """The server's side.

    Args:
        config: as for `make_client_app`.
        resume: the run folder to go on with.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, party_of({"config": config} if config else context.run_config), resume)

    return app


def _who(context: Context, config: str | None) -> tuple[Party, int]:
    party = party_of({"config": config} if config else context.run_config)
    try:
        return party, int(context.node_config["partition-id"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "this node has no partition-id: start it with --node-config 'partition-id=0 num-partitions=...'"
        ) from error


client_app = make_client_app()
server_app = make_server_app()
