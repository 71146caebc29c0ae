"""A model of a few numbers whose loss is a quadratic, for clients' steps that numpy can follow.

    loss = sum over the tensors of 1/2 sum h (w - at)^2        so the gradient is h (w - at)

`h` and `at` stand for a client's data. It goes through the real training loop; only the loss is another.
"""

import numpy as np
import torch

from fedtune.core.protocol import Batch

# Non-square: in = 3, out = 2, r = 1
A, B = "layer.lora_A.weight", "layer.lora_B.weight"
SHAPES = {A: (1, 3), B: (2, 1)}


class Toy:
    """What of `LocalModel` a client uses."""

    def __init__(self, start):
        self.device, self.dtype = torch.device("cpu"), "float32"
        self.scaling = 2.0
        self.module = torch.nn.Module()
        self.live = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        for place, parameter in enumerate(self.live.values()):
            self.module.register_parameter(f"p{place}", parameter)

    def parameters(self):
        return list(self.live.values())

    def read(self):
        return {name: value.detach().clone() for name, value in self.live.items()}

    def install(self, tensors, scaling=None):
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.live[name].copy_(tensor)

    def trained(self):
        return self.live


class Endless:
    """Batches whose content nobody looks at."""

    def __init__(self, examples=1):
        self.examples = examples

    def __iter__(self):
        while True:
            yield Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))


def quadratic(monkeypatch, h, at):
    """Let the training loop's loss be the quadratic of these, which map names to arrays."""
    order = list(SHAPES)

    def loss_of(module, batch):
        terms = [
            (torch.tensor(h[name]) * (parameter - torch.tensor(at[name])).square()).sum() / 2
            for name, parameter in zip(order, module.parameters(), strict=True)
        ]
        return torch.stack(terms).sum()

    monkeypatch.setattr("fedtune.training.gradients.loss_of", loss_of)


def drawn(seed, low=-1.0, high=1.0):
    """Float64 arrays of the toy's shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(low, high, shape) for name, shape in SHAPES.items()}
