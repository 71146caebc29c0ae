"""Centralized: a control in which all data is in one place.

No method of a paper's. It is the loop of FedIT (Zhang et al. 2024, arXiv:2305.05644) with a single client that holds
the data of all N, and so plain training, which federated methods try to come near to:

    theta <- cohort x steps optimizer steps on the union of the clients' training data        p_k = 1

A round sees as many examples as a round of the cohort would have seen, batches being full: cohort x steps x batch_size.
The union is exactly the rows that the N clients would train on, and the server's held-out rows are the same too.
Down and up: one client's adapter, bytes per scalar times r (in + out) a layer, which counts what moving the adapter to
the data costs; the data itself was moved for nothing.
Exact: one client's B A as it trained it. One rank. On the client: nothing.
The steps: clients/first_order.py. How the clients become one: `pooled` in the YAML, fedtune/config/schema.py.
Departs from plain training: the optimizer begins anew in each round, as it does in the federated methods.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import Traits
from strategies.fedit import FedIT, State

__all__ = ["Centralized", "State"]


@dataclass(frozen=True)
class Centralized(FedIT):
    traits: ClassVar[Traits] = Traits(title="Centralized", control=True, averages=True)
