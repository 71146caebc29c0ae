"""SCAFFOLD: local steps corrected by how a client's gradients differ from everybody's.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv:1910.06378,
Algorithm 1 with option II.

Each of the N clients keeps a control variate c_i and the server their mean c, all zero at first. Those that take part
make K plain steps from x, the adapter A and B, and take the mean gradient that they met as their new c_i:

    y_i <- y_i - lr (g_i(y_i) - c_i + c)        c_i+ = c_i - c + (x - y_i) / (K lr)

and the server, with p_k = n_k / sum(n) over the clients S that replied,

    x+ = sum_k p_k y_k        c+ = c + |S| / N mean_k (c_k+ - c_k)

Up: y_i and c_i+ - c_i. Down: x and c. Either is twice bytes per scalar times r (in + out) a layer, so twice FedIT's.
Inexact, as FedIT is: A and B are averaged apart. One rank for all.
On the client: c_i, and its last change until that is known to have counted. A turn whose reply is lost or refused never
happened, so c stays the mean of the c_i; only with a device's memory its part of c is lost, and its c_i begins at 0.
The steps: clients/scaffold.py. Who believes what counted: fedtune/training/control_variates.py.
Departs from the paper: x is weighted by samples, c as there by clients. The paper's global rate is
server_optimizer=fedavgm with server_optimizer.momentum=0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedtune.core.checks import at_least
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Setting, Tensors, Traits, Update, expect_like, share
from fedtune.lowrank.averaging import cast_like
from fedtune.lowrank.residual import FROM, VERSION
from fedtune.training.control_variates import CHANGE, CONTROL, COUNTED, tag


@dataclass(frozen=True)
class State:
    adapter: Tensors  # x: A and B of every layer, as trained
    control: Tensors  # c, by the adapter's names
    counted: dict[str, int] = field(default_factory=dict)  # by client: the round of its last turn that counted


@dataclass(frozen=True)
class Scaffold:
    clients: int  # N, of the whole population

    traits: ClassVar[Traits] = Traits(title="SCAFFOLD", averages=True, population_size="clients")

    def __post_init__(self) -> None:
        at_least("method.strategy.clients", self.clients, 1)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), {name: torch.zeros_like(t) for name, t in layout.initial.items()})

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        settings: dict[str, Setting] = {VERSION: round, FROM: 0}
        counted = state.counted.get(str(peer.index), 0)
        if not counted or peer.base_version != counted:  # else both know, and all such peers are sent the same
            settings[COUNTED] = counted
        return Instruction({**state.adapter, **tag(CONTROL, state.control)}, settings)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, {**state.adapter, **tag(CHANGE, state.control)})

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        x = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.adapter.items()}
        c = {name: tensor.double() for name, tensor in state.control.items()}
        counted = dict(state.counted)
        for weight, (peer, update) in zip(share(replies), replies, strict=True):
            for name in x:
                x[name].add_(update.tensors[name], alpha=weight)
                c[name].add_(update.tensors[CHANGE + name], alpha=1 / self.clients)
            counted[str(peer.index)] = round
        return State(cast_like(x, state.adapter), cast_like(c, state.control), counted)
