"""The local training loop that clients share, and the loss behind it. Whoever drives it computes the gradients:
fedtune/training/gradients.py."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedtune.core.errors import ClientError
from fedtune.core.protocol import Batch, GradientRequest, InSteps
from fedtune.core.seeds import derive_seed
from fedtune.models.adapted_model import LocalModel
from fedtune.training.optimizers import make_optimizer as make_optimizer
from fedtune.training.schedule import RoundSchedule

LOSS_SCALE = 2.0**16  # that a turn begins with where the base is in float16


def supervised_logits(module: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions where the loss counts, and only there.

    The vocabulary's projection is a fifth of a small model's work, and most positions are prompt or padding. Whatever
    the architecture, it passes its hidden states through its output embeddings; the others are dropped on the way in.
    No attention mask is needed: padding is on the right and attention looks left.

    Returns:
        logits: (n, vocabulary), in the model's dtype.
        labels: (n,) int64, the tokens that follow.
    """
    counts = batch.targets[:, 1:]

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, -batch.tokens.shape[1] : -1][counts], *inputs[1:])  # virtual tokens come first

    handle = module.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits = module(input_ids=batch.tokens, use_cache=False).logits
    finally:
        handle.remove()
    return logits, batch.tokens[:, 1:][counts]


def loss_of(module: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood per learnt token, float32, in nats."""
    logits, labels = supervised_logits(module, batch)
    return functional.cross_entropy(logits.float(), labels)


def fit(
    model: LocalModel,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    optimizer: str,
    weight_decay: float,
    max_grad_norm: float,
    key: int,
    penalty: Callable[[], Tensor] | None = None,
    watch: Callable[[], None] | None = None,
    schedule: RoundSchedule | None = None,
) -> InSteps[float]:
    """Train the model's trainable tensors in place, with a fresh optimizer, between the gradients that it asks for.

    Args:
        key: seeds dropout, the only random draw here.
        penalty: what is added to the loss at each step, a function of the parameters themselves.
        watch: called at each step between the backward pass and the step, where the gradients, unclipped, are.
        schedule: what share of `lr` each step has; None: all of it.

    Returns:
        The mean of the steps' losses, without the penalty.

    Raises:
        ClientError: if the loss stops being a finite number.
    """
    parameters = model.parameters()
    update = make_optimizer(optimizer, parameters, lr, weight_decay)
    scale = LOSS_SCALE if model.dtype == "float16" else 1.0
    total = 0.0
    try:
        for step, batch in enumerate(islice(batches, steps), 1):
            if schedule is not None:
                for group in update.param_groups:
                    group["lr"] = lr * schedule.share(step - 1, steps)
            reply = yield GradientRequest(model, batch, derive_seed(key, "step", step), scale)
            if not (scale := reply.scale):
                raise ClientError(
                    "gradients don't fit float16, however the loss is scaled: take model.dtype=float32, or another "
                    "model"
                )
            if not math.isfinite(reply.loss):
                raise ClientError(
                    f"the training loss became {reply.loss} at step {step} of {steps}: "
                    f"lower train.lr (now {lr:g}) or set train.max_grad_norm"
                )
            total += reply.loss
            if penalty is not None:
                penalty().backward()  # type: ignore[no-untyped-call]
            if watch is not None:
                watch()
            # Where the loss is 0 to the last bit there is nothing left to learn
            if torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf) == 0 and reply.loss != 0:
                raise _without_gradient(model, step, steps, reply.loss, lr)
            update.step()
            update.zero_grad()
    finally:
        for parameter in parameters:
            parameter.grad = None
    return total / steps


def _without_gradient(model: LocalModel, step: int, steps: int, loss: float, lr: float) -> ClientError:
    """The error of a step whose gradient is zero. From where all start that is the model's own; later it had one, and
    steps that were too large have led to where all is saturated."""
    if step == 1 and model.at_start():
        return ClientError(
            f"no gradient reached the trainable tensors at step {step} of {steps}: this model's layers, as "
            "they are held here, can't be trained through. Try another model.quantization"
        )
    return ClientError(
        f"training diverged: at step {step} of {steps} the loss is {loss:g} and its gradient zero. Lower train.lr (now "
        f"{lr:g})"
    )
