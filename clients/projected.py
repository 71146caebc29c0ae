"""First-order local training that answers with coordinates of its update (strategies/ferret.py).

The server's settings: fedtune.training.projection.Projection; `client`, whose directions these are; `share`, of the
update, what the
server rebuilds in the mean. The client's memory is what all clients have answered so far: `turn`, `budget` and `slopes`
(fedtune/training/projection.py), a row for each answer, and their number.
"""

from dataclasses import dataclass

from clients.first_order import FirstOrder, proximal
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.lowrank.residual import VERSION
from fedtune.models.adapted_model import LocalModel
from fedtune.training.catch_up import caught_up
from fedtune.training.projection import BUDGET, SLOPES, TURN, Projection, blocks_of, coordinates, records_of, seeds_of
from fedtune.training.zeroth_order import as_told


@dataclass(frozen=True)
class Projected(FirstOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        rules = as_told(Projection, instruction.settings)
        known = caught_up(instruction, memory, [TURN, BUDGET, SLOPES], "number", "answers")
        model.seeded.move_blocks(rules.space, records_of(known, blocks_of(model.layout), rules))

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        # Not a generator itself: a model that was made for this turn would have to go the whole way here anew
        return self._train(model, batches, instruction, key)

    def _train(self, model: LocalModel, batches: Batches, instruction: Instruction, key: int) -> InSteps[Update]:
        settings = instruction.settings
        rules = as_told(Projection, settings)
        # What was received may be held in fewer bits than the difference to it needs, so that is taken in float32
        live = model.trained()
        old = {name: tensor.detach().clone() for name, tensor in live.items()}
        loss = yield from self.fit(model, batches, key, proximal(model, self.mu) if self.mu else None)
        seeds = seeds_of(rules, int(settings[VERSION]), int(settings["client"]))
        answer = coordinates(old, live, blocks_of(model.layout), rules, seeds, float(settings["share"]))
        return Update(answer, batches.examples, {"train_loss": loss})
