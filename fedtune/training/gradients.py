"""The gradients that clients ask for between their steps: of one, or of many in one pass over the base they share."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from fedtune.core.protocol import GradientReply, GradientRequest, InSteps
from fedtune.core.seeds import derive_seed
from fedtune.models.adapted_model import LocalModel
from fedtune.models.packing import Passenger, packed_losses
from fedtune.training.first_order import loss_of

Result = TypeVar("Result")


def finished(steps: InSteps[Result]) -> Result:
    """What a turn comes to, its gradients computed for it alone."""
    try:
        request = next(steps)
        while True:
            request = steps.send(gradients([request])[0])
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        steps.close()


def gradients(requests: Sequence[GradientRequest]) -> list[GradientReply]:
    """Add up in each model's trained tensors the gradient of its batch's mean loss.

    A float16 base can't hold gradients as small as they come, nor large ones. So the loss is multiplied by a power of
    two on the way back, and the float32 gradients that arrive are divided by it, which rounds nothing. Where one has
    become infinite the scale is halved and that batch taken again: of a turn's few steps none is left out.

    Args:
        requests: of models on one base. More than one only where that base has no `obstacle`.
    """
    replies: dict[int, GradientReply] = {}
    waiting = {place: (request, request.scale) for place, request in enumerate(requests)}
    while waiting:
        losses = _accumulate(list(waiting.values()))
        again = {}
        for (place, (request, scale)), loss in zip(waiting.items(), losses, strict=True):
            if scale != 1 and math.isfinite(loss) and not _unscaled(request.model, scale):
                if scale / 2 >= 2:
                    again[place] = (request, scale / 2)
                    continue
                loss, scale = math.nan, 0.0
            replies[place] = GradientReply(loss, scale)
        waiting = again
    return [replies[place] for place in range(len(requests))]


def _unscaled(model: LocalModel, scale: float) -> bool:
    """Divide the gradients by `scale` if they are finite, else drop them; returns whether they are."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if all(gradient.isfinite().all() for gradient in found):
        torch._foreach_mul_(found, 1 / scale)
        return True
    for parameter in model.parameters():
        parameter.grad = None
    return False


def _accumulate(requests: Sequence[tuple[GradientRequest, float]]) -> list[float]:
    """Add up `scale` times the gradients of all batches' mean losses, one micro-batch of each after the other.

    Returns:
        The mean loss of each.
    """
    total = [0.0] * len(requests)
    for number, parts in enumerate(zip_longest(*(request.batch.parts() for request, _ in requests))):
        here = [(place, part) for place, part in enumerate(parts) if part is not None]
        passengers = [
            Passenger(requests[place][0].model, part, derive_seed(requests[place][0].key, "part", number))
            for place, (part, _) in here
        ]
        with _losses(passengers) as losses:
            shares = [loss if share == 1 else loss * share for loss, (_, (_, share)) in zip(losses, here, strict=True)]
            scales = [requests[place][1] for place, _ in here]
            roots = [loss if scale == 1 else loss * scale for loss, scale in zip(shares, scales, strict=True)]
            torch.autograd.backward([root for root in roots if root.requires_grad])  # not of a batch without any token
            for (place, _), value in zip(here, torch.stack(shares).tolist(), strict=True):
                total[place] += value
    return total


@contextmanager
def _losses(passengers: Sequence[Passenger]) -> Iterator[list[Tensor]]:
    model = passengers[0].model
    root = getattr(model, "root", model)
    if getattr(root, "obstacle", "alone"):
        (alone,) = passengers
        with seeded(alone.key, model.device):
            model.module.train()
            try:
                yield [loss_of(model.module, alone.batch.to(model.device))]
            finally:
                model.module.eval()
        return
    change = model.base_delta.tensors
    if root.base_delta.tensors is not change and (change or root.base_delta.tensors):
        root.base_delta.set(change)
    # Activations are computed anew in training alone, and there bitsandbytes takes int8 layers' inputs as they are
    trains = root.checkpoints or root.quantization == "int8"
    if trains:
        root.module.train()
    try:
        with packed_losses(passengers) as losses:
            yield losses
    finally:
        if trains:
            root.module.eval()


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators set by `key` within, and afterwards as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would note a stack trace for every kind of device there might be: 1 ms, each turn
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield
