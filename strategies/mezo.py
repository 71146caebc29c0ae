"""MeZO: a control in which all data is in one place and weights follow slopes of the loss, not gradients.

Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333;
https://github.com/princeton-nlp/MeZO. With sparsity > 0 it is Sparse-MeZO (Liu et al. 2024, arXiv:2402.15751).

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)        w <- w - lr g z        p_k = 1

It is the loop of DeComFL (strategies/decomfl.py) with a single client that holds the data of all N. A round has
rules.local_steps times the cohort's size steps, as many as the cohort would have taken together.
Down and up: the slopes, at most 4 bytes a step, which counts what moving the model to the data would cost; the data
itself was moved for nothing.
Exact: one client's weights as it trained them.
The steps: fedtune/training/zeroth_order.py.
Departs from the authors' code: weights are made anew from w0 for each forward pass instead of being moved by +1, -2 and
+1 times eps z, which in 16 bits doesn't lead back; no weight decay.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import Traits
from strategies.decomfl import DeComFL, State

__all__ = ["MeZO", "State"]


@dataclass(frozen=True)
class MeZO(DeComFL):
    traits: ClassVar[Traits] = Traits(
        title="MeZO",
        control=True,
        lossy_up=False,
        lossy_down=False,
        local_steps="rules.local_steps",
        learning_rate="rules.lr",
    )
