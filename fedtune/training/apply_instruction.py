"""How a client makes its model what an instruction describes, and what it says of itself in return."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedtune.config.train import TrainSpec
from fedtune.core.errors import ClientError, WireError
from fedtune.core.protocol import Instruction, Setting, Tensors, Update
from fedtune.core.settings import EngineSetting
from fedtune.lowrank.averaging import truncate_rank
from fedtune.lowrank.residual import update_residual
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base_delta import DENSE

# By shorter names
TRAIN, SCALING, RANK = EngineSetting.TRAIN, EngineSetting.SCALING, EngineSetting.RANK
BATCH, BITS, STEPS = EngineSetting.BATCH_SIZE, EngineSetting.BITS, EngineSetting.STEPS
SCORE = "score"  # whether a score of each layer is wanted with the answer
SCORES = "scores"  # the answer's, (layers,) float32 in the order of the layers' names
SCORE_BYTES = 8  # per trainable number, of what a score is made from: two running means


def install(model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
    """Change of the base, adapter, rank, scaling, and what is to be trained, as far as the instruction has them.

    Of what it doesn't have, a client whose rank is its own starts from the first components of what all start from.

    Raises:
        ClientError: if a change builds on one that this client hasn't got, or the rank is one that nobody has.
        ModelError: for a tensor that this model doesn't have.
    """
    residual, rest = update_residual(instruction, memory)
    dense = {name: tensor for name, tensor in rest.items() if name.endswith(DENSE)}
    if change := residual | dense:
        model.base_delta.set(change)
    if rank := int(instruction.settings.get(RANK, 0)):
        if rank > model.layout.rank:
            raise ClientError(f"the server asks for rank {rank}; the adapters of this run have {model.layout.rank}")
        start = truncate_rank(model.layout.initial, rank)
        narrower = {name: tensor for name, tensor in start.items() if tensor is not model.layout.initial[name]}
        rest = narrower | rest
    scaling = instruction.settings.get(SCALING)
    model.install(
        {name: tensor for name, tensor in rest.items() if name not in dense},
        None if scaling is None else float(scaling),
    )
    if TRAIN in instruction.settings:
        model.train_only([str(instruction.settings[TRAIN])])


def with_steps(client: Any, train: TrainSpec, settings: Mapping[str, Setting], samples: int) -> Any:
    """The client with the steps of this turn: as many as the server says, else as train.epochs come to.

    Args:
        samples: training examples that it holds.
    """
    if STEPS in settings:
        return replace(client, steps=int(settings[STEPS]))
    if train.epochs is None:
        return client
    return replace(client, steps=train.steps_of(samples, int(settings.get(BATCH, train.batch_size))))


def metrics_of(model: LocalModel) -> dict[str, float]:
    """What travels with every update, so that nobody has to guess it."""
    return {} if model.scaling is None else {SCALING: model.scaling}


def check_scaling(update: Update, expected: float) -> None:
    """Check that the client multiplied B A by what it was told.

    Raises:
        WireError: if the client trained with another alpha / r than it was told.
    """
    got = update.metrics.get(SCALING, expected)
    if got != expected:
        raise WireError(f"it multiplied B A by alpha / r = {got:g}, expected {expected:g}")
