"""First-order training of a LoRA adapter that begins anew at each turn: A drawn by the client's key, B = 0.

The server's settings: `rank` and `scaling` of the adapter where they are this client's own, and the change of the base
(fedtune/lowrank/residual.py), which is what the client goes on from.
"""

from dataclasses import dataclass

from clients.first_order import FirstOrder
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base_delta import DENSE
from fedtune.training.apply_instruction import RANK, SCALING


@dataclass(frozen=True)
class Fresh(FirstOrder):
    dense: bool = False  # answer with the matrix s B A of each layer instead of its factors

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        settings = instruction.settings
        scaling = settings.get(SCALING)
        rank = int(settings.get(RANK, model.layout.rank))
        model.start_at(rank, None if scaling is None else float(scaling), key)
        update = yield from super().train(model, batches, instruction, memory, key)
        if not self.dense:
            return update
        factor = update.metrics[SCALING]
        products = lora_factors(update.tensors)
        matrices = {m + DENSE: (p.b.double() @ p.a.double() * factor).float() for m, p in products.items()}
        return Update(matrices, update.examples, update.metrics)
