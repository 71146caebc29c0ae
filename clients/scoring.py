"""First-order local training of the layers that the server sent, and of no others, with a score of each if it asks.

A layer's score says how much the loss would change without its components, as far as gradients tell (AdaLoRA, Zhang et
al. 2023, arXiv:2303.10512). With B A = P L Q, component j being L_j P_.j Q_j., and w any entry of these,

    I = |w dloss/dw|        Ibar <- b1 Ibar + (1 - b1) I        Ubar <- b2 Ubar + (1 - b2) |I - Ibar|
    s(w) = Ibar Ubar        S_j = s(L_j) + mean s(P_.j) + mean s(Q_j.)        score = sum_j S_j

w dloss/dw doesn't depend on how B A is divided among the three: of P_ij it is B_ij dloss/dB_ij, of Q_jk likewise with
A, and of L_j sum_i B_ij dloss/dB_ij. So it comes from the gradients that training has anyway, at each of its steps; no
pass is added. The means begin at zero with each turn, and a client keeps nothing. With mu > 0 the loss is the one with
the proximal term.

The server's settings: `score`, and those of clients/first_order.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients.first_order import FirstOrder, proximal
from fedtune.core.costs import Work
from fedtune.core.protocol import Batches, InSteps, Instruction, Setting, Tensors, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import SCORE, SCORE_BYTES, SCORES, install, metrics_of


@dataclass(frozen=True)
class Scoring(FirstOrder):
    beta1: float = 0.85
    beta2: float = 0.85

    def work(self, settings: Mapping[str, Setting]) -> Work:
        plain = super().work(settings)
        return replace(plain, state_bytes=plain.state_bytes + SCORE_BYTES) if settings.get(SCORE) else plain

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        # A client that tries codecs on itself installs its own answer, scores and all
        adapter = {name: tensor for name, tensor in instruction.tensors.items() if name != SCORES}
        model.adapt_only(lora_factors(adapter).keys())
        install(model, Instruction(adapter, instruction.settings), memory)

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        asked = bool(instruction.settings.get(SCORE))
        sensitivity = Sensitivity(model.trained(), self.beta1, self.beta2) if asked else None
        near = proximal(model, self.mu) if self.mu else None
        loss = yield from self.fit(model, batches, key, near, sensitivity.watch if sensitivity else None)
        answer = model.read()
        if sensitivity:
            answer[SCORES] = sensitivity.scores()
        return Update(answer, batches.examples, {"train_loss": loss, **metrics_of(model)})


class Sensitivity:
    """The running means over a turn's steps.

    Args:
        live: A and B of the layers, whose gradients are there when `watch` is called.
    """

    def __init__(self, live: Mapping[str, Tensor], beta1: float, beta2: float):
        self._live = lora_factors(dict(live))
        self._beta1, self._beta2 = beta1, beta2
        self._means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # Ibar and Ubar of each layer's L, P and Q

    def watch(self) -> None:
        with torch.no_grad():
            for module, layer in self._live.items():
                assert layer.b.grad is not None
                assert layer.a.grad is not None
                p, q = layer.b * layer.b.grad, layer.a * layer.a.grad
                for part, entries in (("L", p.sum(0)), ("P", p), ("Q", q)):
                    self._follow((module, part), entries.abs())

    def scores(self) -> Tensor:
        """The score sum_j S_j of each layer, (layers,) float32 on the CPU, in the order of their names."""
        found = []
        for module in sorted(self._live):
            line, left, right = (self._score(module, part) for part in "LPQ")
            found.append((line + left.mean(0) + right.mean(1)).sum())
        return torch.stack(found).float().cpu()

    def _follow(self, key: tuple[str, str], seen: Tensor) -> None:
        mean, off = self._means.get(key, (torch.zeros_like(seen), torch.zeros_like(seen)))
        mean = self._beta1 * mean + (1 - self._beta1) * seen
        self._means[key] = mean, self._beta2 * off + (1 - self._beta2) * (seen - mean).abs()

    def _score(self, module: str, part: str) -> Tensor:
        mean, off = self._means[module, part]
        return mean * off
