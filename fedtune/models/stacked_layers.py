"""Several clients' adapters in one layer: each client's rows with that client's tensors, the base's product for all.

Rows are tokens, n of a client. What a kind does to its client's rows, before the base's product and after it:

    lora, rslora, pissa    y + s B A drop(x)                               A (r, in), B (out, r)
    vera                   y + b * (P_B (d * (P_A drop(x))))               d (r,), b (out,), P those of all layers
    bone                   y + (sum of drop(x)'s pieces of length r) M     M (r, out)
    ia3                    y * l, or W0 (x * l) in a feed-forward layer    l (out,) or (in,)
    oft                    W0 (x R), R blocks of rotations                 Q (blocks, b (b - 1) / 2), R from Cayley

as PEFT computes them for one client. A client whose layer is switched off has y as the base gives it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedtune.models.grouped_rows import Grouping

Rows = Tensor  # (n, width)


@dataclass(frozen=True)
class LayerShare:
    """What one client has in one layer.

    Attributes:
        tensors: by role.
        scaling: what B A is multiplied by.
        through: (r, in), what the input passes first; None where it doesn't (fedtune/training/frozen_basis.py).
        dropout: the share of the adapter's input that is dropped.
        key: draws what is dropped.
    """

    tensors: Mapping[str, Tensor]
    scaling: float = 1.0
    through: Tensor | None = None
    dropout: float = 0.0
    key: int = 0

    def dropped(self, rows: Rows) -> Rows:
        """The rows with dropout; the mask follows from the key alone, so that it is the same when activations are
        computed anew."""
        if not self.dropout:
            return rows
        drawn = torch.Generator(rows.device).manual_seed(self.key)
        kept = torch.empty_like(rows).bernoulli_(1 - self.dropout, generator=drawn)
        return rows * kept / (1 - self.dropout)


def _lora(layer: Any, own: LayerShare, x: Rows, y: Rows) -> Rows:
    a, b = own.tensors["lora_A"], own.tensors["lora_B"]
    inner = own.dropped(x.to(a.dtype))
    if own.through is not None:
        inner = functional.linear(inner, own.through)
    return y + functional.linear(functional.linear(inner, a), b) * own.scaling


def _vera(layer: Any, own: LayerShare, x: Rows, y: Rows) -> Rows:
    d, b = own.tensors["vera_lambda_d"], own.tensors["vera_lambda_b"]
    down = layer.vera_A["default"][:, : layer.in_features].to(x.device)
    up = layer.vera_B["default"][: layer.out_features].to(x.device)
    inner = d * functional.linear(own.dropped(x.to(d.dtype)), down)
    return y + b * functional.linear(inner, up)


def _bone(layer: Any, own: LayerShare, x: Rows, y: Rows) -> Rows:
    block = own.tensors["miss_block"]
    rank = block.shape[0]
    padded = functional.pad(x, (0, -x.shape[-1] % rank)).to(block.dtype)
    return y + own.dropped(padded).reshape(len(x), -1, rank).sum(1) @ block


def _ia3_after(layer: Any, own: LayerShare, x: Rows, y: Rows) -> Rows:
    return y if layer.is_feedforward else y * own.tensors["ia3_l"].flatten()


def _ia3_before(layer: Any, own: LayerShare, x: Rows) -> Rows:
    return (x * own.tensors["ia3_l"].flatten()).to(x.dtype) if layer.is_feedforward else x


def _oft_before(layer: Any, own: LayerShare, x: Rows) -> Rows:
    rotation, q = layer.oft_R["default"], own.tensors["oft_R"]
    size = rotation.block_size
    turned = rotation._cayley_batch(q, size, rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms)
    pieces = x.to(q.dtype).reshape(len(x), -1, size)
    return torch.einsum("nrk,rkc->nrc", pieces, turned).reshape(x.shape).to(x.dtype)


Before = Callable[[Any, LayerShare, Rows], Rows]
After = Callable[[Any, LayerShare, Rows, Rows], Rows]

STACKED: dict[str, tuple[Before | None, After | None]] = {
    "lora": (None, _lora),
    "rslora": (None, _lora),
    "pissa": (None, _lora),
    "vera": (None, _vera),
    "bone": (None, _bone),
    "ia3": (_ia3_before, _ia3_after),
    "oft": (_oft_before, None),
}


def _grouped_lora(shares: Sequence[LayerShare], grouping: Grouping, x: Rows, y: Rows) -> Rows:
    """What `_lora` does, for all clients in as many kernels as for one: narrower adapters are filled up with zeros,
    whose gradients are zero."""
    factors = [(own.tensors["lora_A"], own.tensors["lora_B"]) for own in shares]
    rank = max(len(a) for a, _ in factors)
    a = torch.stack([functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in factors])
    b = torch.stack([functional.pad(b, (0, rank - b.shape[1])) for _, b in factors])
    inner = torch.bmm(grouping.spread(x.to(a.dtype)), a.mT)
    change = torch.bmm(inner, b.mT)
    if len({own.scaling for own in shares}) == 1:
        change = change * shares[0].scaling
    else:
        change = change * torch.tensor([own.scaling for own in shares], device=x.device)[:, None, None]
    return y + grouping.gather(change, len(y))


def stacked(
    layer: Any,
    kind: str,
    shares: Sequence[LayerShare | None],
    sizes: Sequence[int],
    grouping: Grouping | None = None,
) -> Callable[..., Tensor]:
    """The forward of an adapted layer for the rows of several clients.

    Args:
        layer: PEFT's.
        kind: of adapter, one of STACKED.
        shares: of each client in the order of its rows; None where the layer is as the base has it.
        sizes: how many rows each has; whatever comes behind them is nobody's.
        grouping: of the rows by client, for LoRA in a few kernels for all; None: client by client.
    """
    before, after = STACKED[kind]
    plain = [own for own in shares if own and not own.dropout and own.through is None]
    if grouping is not None and after is _lora and len(plain) == len(shares):
        groups = grouping

        def at_once(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = layer.base_layer(x, *args, **kwargs)
            return _grouped_lora(plain, groups, x[0], y[0])[None].to(y.dtype)

        return at_once

    def split(rows: Tensor) -> list[Rows]:
        return list(torch.split(rows[0], [*sizes, rows.shape[1] - sum(sizes)]))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = split(x)
        if before is not None:
            given = [before(layer, own, rows) if own else rows for own, rows in zip(shares, inputs, strict=False)]
            x = torch.cat([*given, inputs[-1]])[None]
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        if after is None:
            return y
        outputs = split(y)
        made = [
            after(layer, own, rows, out).to(y.dtype) if own else out
            for own, rows, out in zip(shares, inputs, outputs, strict=False)
        ]
        return torch.cat([*made, outputs[-1]])[None]

    return forward
