"""What training takes, in bytes, floating-point operations and seconds: the figures that plans and the virtual clock
are made from.

With l the lowest block that has something to train, P trainable numbers, and T the bytes per token that LoRA layers
keep,

    T = sum (input_bytes columns_j + inner_bytes r_j)             over the adapted weights j
    memory  = base_bytes[q] + fixed_bytes + b (saved_bytes[l] + head_bytes + tokens T) + state_bytes P
    flop    = b (forward_flop + backward_flop[l] + 6 typical_tokens P)                a step
    compute = steps slowdown[q] (flop / flop_per_s + read_bytes[l] / read_bytes_per_s)

of b examples a step on a base in q bits. The second term of `compute` is what small batches wait for: every step takes
the whole base through the processor, however little there is to multiply it with. docs/planning.md compares this with
measurements. Where a batch goes through the base in micro-batches of m examples (train.micro_batch_size), memory is
that of m, and the second term counts ceil(b / m) times.

Where activations are computed anew (train.checkpoint_activations), `saved_bytes[l]` is the inputs of the blocks from l
on and all that the largest of them keeps, LoRA's part included, so T is 0; `backward_flop[l]` and `read_bytes[l]` have
a second forward pass through these blocks.

Values that a checkpoint can hold: numbers, lists, and mappings with keys of text.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Per trainable number, by optimizer: itself and its gradient in float32, and what the optimizer keeps of it. AdamW in 8
# bits keeps two bytes and, of each 256, two scales; what it pages out where memory is short is counted all the same
STATE_BYTES = {"adamw": 16.0, "sgd": 8.0, "adamw8bit": 10 + 8 / 256, "paged_adamw8bit": 10 + 8 / 256}


def at_once(batch: int, micro_batch: int) -> int:
    """Examples of a batch that go through the model at a time; a micro-batch of 0 is the whole."""
    return min(batch, micro_batch) if micro_batch else batch


@dataclass(frozen=True)
class Costs:
    """What training takes on one base. Blocks count from 0, nearest the input, to the last."""

    base_bytes: dict[str, float]  # by bits, "4", "8", "16", "32": the frozen base in memory
    slowdown: dict[str, float]  # by bits: how much longer a step takes than at 16 bits, 1.0 there
    tokens: float  # of the longest example, padded: what memory has to hold
    typical_tokens: float  # of an example of average padded length: what takes time
    forward_flop: float  # of one typical example
    backward_flop: list[float]  # [block]: of one typical example where back-propagation ends there; never increasing
    read_bytes: list[float]  # [block]: of the base, that a step reads if it ends there, in 16 bits; never increasing
    saved_bytes: list[float]  # [block]: kept for one longest example's backward pass to there; never increasing
    head_bytes: float  # logits and what becomes of them, of one longest example
    fixed_bytes: float  # what a step takes whatever is trained
    input_bytes: float = 4.0  # per token and input column of an adapted weight: LoRA's own copy of its input
    inner_bytes: float = 4.0  # per token and component of an adapted weight

    def memory(self, batch: int, bits: int, block: Any, parameters: Any, per_token: Any, state_bytes: float) -> Any:
        """Bytes that a step takes. `block`, P and T may be arrays of one shape, as the answer then is.

        Args:
            batch: examples that go through the model at a time.
            state_bytes: per trainable number: itself, its gradient, and what the optimizer keeps.
        """
        kept = np.asarray(self.saved_bytes)[block] + self.head_bytes + self.tokens * np.asarray(per_token)
        return self.base_bytes[str(bits)] + self.fixed_bytes + batch * kept + state_bytes * np.asarray(parameters)

    def compute(
        self,
        batch: int,
        bits: int,
        steps: int,
        block: Any,
        parameters: Any,
        flop_per_s: Any,
        read_bytes_per_s: Any,
        micro_batch: int = 0,
    ) -> Any:
        """Seconds of so many steps. `block`, P and the two rates may be arrays that fit together.

        Args:
            micro_batch: examples of a batch that go through the model at a time; 0: all of them.
        """
        of_one = (
            self.forward_flop + np.asarray(self.backward_flop)[block] + 6 * self.typical_tokens * np.asarray(parameters)
        )
        passes = -(-batch // at_once(batch, micro_batch))
        step = batch * of_one / flop_per_s + passes * np.asarray(self.read_bytes)[block] / read_bytes_per_s
        return steps * self.slowdown[str(bits)] * step

    def forward(
        self, batch: int, bits: int, passes: float, flop_per_s: float, read_bytes_per_s: float, micro_batch: int = 0
    ) -> float:
        """Seconds of so many forward passes of a batch, without a backward one."""
        parts = -(-batch // at_once(batch, micro_batch))
        once = batch * self.forward_flop / flop_per_s + parts * self.read_bytes[0] / 2 / read_bytes_per_s
        return passes * self.slowdown[str(bits)] * once


@dataclass(frozen=True)
class Weight:
    """A matrix of the base that may be adapted."""

    module: str
    block: int  # which it is part of
    rows: int  # outputs
    columns: int  # inputs


@dataclass(frozen=True)
class Work:
    """What a client's way of training takes, as its class says of itself."""

    steps: int
    state_bytes: float  # per trainable number: itself, its gradient, and what the optimizer keeps
    forward: float = 1  # passes of a step
    backward: bool = True
