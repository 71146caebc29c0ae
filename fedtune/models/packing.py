"""Batches of several clients in one pass over the base that they share, each with an adapter of its own.

    tokens       client 0's examples, client 1's, ... end to end, without padding, up to the last that is learnt
    base         one product for all of them
    adapters     each client's rows with its own tensors (fedtune/models/stacked_layers.py)
    attention    a client's examples, each on itself, padded to that client's longest for this alone
    loss         of each client, the mean over its own tokens

On a CPU nothing of a client's depends on the others': where rows are multiplied at once, each comes out with the same
bits however many there are, as long as these are a multiple of 16 (of 4 with AVX2, seen; the rest is filled up), and
everything else is computed for each client alone. So a client ends in the same bits in whatever company it is trained,
also in none. On a GPU kernels are chosen by shape, and the last bits depend on who is there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedtune.core.protocol import Batch
from fedtune.core.seeds import derive_seed
from fedtune.core.text import first_line
from fedtune.models.attention import attention_of
from fedtune.models.grouped_rows import Grouping
from fedtune.models.stacked_layers import STACKED, LayerShare, stacked

MULTIPLE = 16  # rows are filled up to
ATTENTION = "fedtune_packed"  # the name under which transformers knows `_attention`
NOT_ADDED = ("softcap", "s_aux", "position_bias", "head_mask")  # what some attentions want, and this one hasn't


@dataclass(frozen=True)
class Packed:
    """Some clients' batches as one row.

    Attributes:
        tokens: (1, T) int64.
        positions: (1, T) int64, each token's place in its own example.
        lengths: of each client's examples; what is behind all of them is filling.
        kept: (K,) int64, the tokens from which a learnt one is told, client by client, and filling.
        labels: of each client, (k,) int64: the tokens that are learnt.
        clients: its rows by client, where they are computed in groups.
        examples: its rows by example, likewise.
    """

    tokens: Tensor
    positions: Tensor
    lengths: list[list[int]]
    kept: Tensor
    labels: list[Tensor]
    clients: Grouping | None = None
    examples: Grouping | None = None

    def grouped(self) -> "Packed":
        """With all that is computed for each client computed for all at once."""
        if not all(self.sizes):
            return self
        flat = [length for own in self.lengths for length in own]
        return replace(self, clients=Grouping.of(self.sizes), examples=Grouping.of(flat))

    def to(self, device: torch.device) -> "Packed":
        """The same on that device."""
        if device.type == "cpu":
            return self
        return Packed(
            self.tokens.to(device),
            self.positions.to(device),
            self.lengths,
            self.kept.to(device),
            [own.to(device) for own in self.labels],
            self.clients and self.clients.to(device),
            self.examples and self.examples.to(device),
        )

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each client has."""
        return [sum(each) for each in self.lengths]


def pack(batches: Sequence[Batch], fill: int = 0) -> Packed:
    """The batches end to end. Of an example, what is behind the last token that is told from is left out.

    Args:
        batches: on the CPU, since it asks for many a number.
        fill: the token that fills up.
    """
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    lengths: list[list[int]] = []
    place = 0
    for batch in batches:
        learnt = batch.targets[:, 1:]
        own: list[int] = []
        told: list[Tensor] = []
        for row, (words, counts) in enumerate(zip(batch.tokens, learnt, strict=True)):
            where = counts.nonzero()[:, 0]
            length = int(where[-1]) + 1 if len(where) else 0
            if not length:  # nothing to learn
                continue
            own.append(length)
            tokens.append(words[:length])
            positions.append(torch.arange(length))
            kept.append(where + place)
            told.append(batch.tokens[row, 1:][where])
            place += length
        lengths.append(own)
        labels.append(torch.cat(told) if told else batch.tokens.new_zeros(0))
    more = -place % MULTIPLE if place else MULTIPLE
    tokens.append(torch.full((more,), fill, dtype=torch.int64))
    positions.append(torch.zeros(more, dtype=torch.int64))
    places = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
    return Packed(
        torch.cat(tokens)[None],
        torch.cat(positions)[None],
        lengths,
        functional.pad(places, (0, -len(places) % MULTIPLE)),
        labels,
    )


# Autograd may compute a block anew in a thread of its own, which a context variable wouldn't reach
_now: list[Packed] = []
_seen: dict[str, Any] = {}  # what a base's attention was given last


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of packed examples, each on itself: (1, heads, T, width) to (1, T, heads, width)."""
    _seen.update(kwargs)
    window = kwargs.get("sliding_window")
    packed = _now[-1]
    if packed.examples is not None:
        q, k, v = (packed.examples.spread(t[0].transpose(0, 1)).transpose(1, 2) for t in (query, key, value))
        out = _alone(module, q, k, v, scaling, window)
        return packed.examples.gather(out, query.shape[2])[None], None
    sizes = packed.sizes
    rest = query.shape[2] - sum(sizes)
    split = [list(torch.split(t[0].transpose(0, 1), [*sizes, rest])) for t in (query, key, value)]
    found: list[Tensor] = []
    for lengths, *rows in zip(packed.lengths, *split, strict=False):
        if not lengths:
            continue
        q, k, v = (pad_sequence(list(torch.split(part, lengths)), batch_first=True).transpose(1, 2) for part in rows)
        out = _alone(module, q, k, v, scaling, window)
        found += [example[:length] for example, length in zip(out, lengths, strict=True)]
    found.append(query.new_zeros(rest, query.shape[1], value.shape[3]))
    return torch.cat(found)[None], None


def _alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of padded examples: (examples, heads, L, width) to (examples, L, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask, longest = None, query.shape[2]
    if window is not None and longest > window:
        at = torch.arange(longest, device=query.device)
        mask = (at[:, None] >= at) & (at[:, None] - at < window)
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=mask is None)[0]
    return out


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


@contextmanager
def _as_packed(base: Any, packed: Packed) -> Iterator[None]:
    _register()
    config = base.config.get_text_config()
    before = config._attn_implementation
    _now.append(packed)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        _now.pop()


@dataclass(frozen=True)
class Passenger:
    """A client's part of a pass: a model, the batch that it is asked about, and what draws dropout."""

    model: Any  # LocalModel, all on one base
    batch: Batch
    key: int


@contextmanager
def packed_losses(passengers: Sequence[Passenger], grouped: bool | None = None) -> Iterator[list[Tensor]]:
    """Each one's mean negative log-likelihood per learnt token, float32, in nats. Gradients are to be taken within.

    Args:
        grouped: have attention and LoRA computed for all clients at once, in few kernels, rather than for one after the
            other, with bits that depend on nobody else; None: on a GPU.
    """
    model = passengers[0].model
    packed = pack([each.batch for each in passengers], model.pad)
    if model.device.type != "cpu" if grouped is None else grouped:
        packed = packed.grouped()
    packed = packed.to(model.device)
    head = model.base.get_output_embeddings()

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][0].index_select(0, packed.kept), *inputs[1:])

    with ExitStack() as stack:
        stack.enter_context(_as_packed(model.base, packed))
        stack.callback(head.register_forward_pre_hook(keep).remove)
        forwards = dict(_forwards(model, passengers, packed))
        for layer, forward in forwards.items():
            layer.forward = forward
            stack.callback(delattr, layer, "forward")
        logits = model.module(input_ids=packed.tokens, position_ids=packed.positions, use_cache=False).logits
        own = logits.split([*map(len, packed.labels), len(packed.kept) - sum(map(len, packed.labels))])
        yield [functional.cross_entropy(rows.float(), told) for rows, told in zip(own, packed.labels, strict=False)]


def _forwards(
    model: Any, passengers: Sequence[Passenger], packed: Packed
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    held = [each.model.by_layer for each in passengers]
    for name, layer in model.layers.items():
        shares = [
            None
            if name in each.model.switched_off
            else LayerShare(
                own[name],
                each.model.scalings.get(name, 1.0),
                each.model.through.get(name),
                each.model.dropout,
                derive_seed(each.key, name) if each.model.dropout else 0,
            )
            for each, own in zip(passengers, held, strict=True)
        ]
        yield layer, stacked(layer, model.kind, shares, packed.sizes, packed.clients)


def obstacle(model: Any) -> str:
    """Why clients on this model can't be trained at once, or "". It then goes through the base one batch at a time."""
    if model.kind not in STACKED:
        return f"adapter.kind={model.kind} has no form for several clients"
    if (held := attention_of(model.base)) != "sdpa":
        return f"its attention is {held}, and examples are packed for sdpa alone"
    base = model.base
    adapters = {id(part) for layer in model.layers.values() for part in layer.modules()}
    if any(isinstance(m, nn.Dropout) and m.p > 0 and id(m) not in adapters for m in base.modules()):
        return "the base has dropout of its own"
    config = base.config.get_text_config()
    settings = config.to_dict()
    if any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings.items()):
        return "the base has experts, whose rows depend on one another"
    own = {name: value for name, value in settings.items() if not name.startswith(("summary_", "classifier_"))}
    if any("drop" in name and isinstance(value, float) and value > 0 for name, value in own.items()):
        return "the base has dropout of its own"
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in ends or any(id(end) in adapters for end in ends):
        return "the vocabulary's own layers are adapted"
    key = (type(base).__name__, model.quantization, str(base.dtype), str(model.device), config.to_json_string())
    if key not in _tried:
        _tried[key] = _try(model, bool(settings.get("sliding_window")))
    return _tried[key]


_tried: dict[tuple[str, ...], str] = {}


def _try(model: Any, windowed: bool) -> str:
    """Two examples packed, and each alone as the base takes it."""
    words = torch.arange(1, 9)
    batches = [Batch(part[None], torch.ones(1, len(part), dtype=torch.bool)) for part in (words[:5], words[5:])]
    packed = pack(batches).to(model.device)
    _seen.clear()
    try:
        with torch.no_grad():
            with _as_packed(model.base, packed):
                given = model.module(input_ids=packed.tokens, position_ids=packed.positions, use_cache=False)
            found = given.logits[0, : sum(packed.sizes)].float()
            examples = [each.tokens[:, :-1].to(model.device) for each in batches]
            alone = [model.module(input_ids=each, use_cache=False).logits[0] for each in examples]
    except Exception as error:  # whatever an architecture makes of what it doesn't know
        return f"{type(model.base).__name__} can't take packed examples ({first_line(error)[:120]})"
    wanted = torch.cat(alone).float()
    off = float((found - wanted).norm() / wanted.norm())
    if not off < (1e-3 if model.base.dtype == torch.float32 and model.quantization == "none" else 0.05):
        return f"{type(model.base).__name__} makes something else of packed examples"
    beyond = [name for name in NOT_ADDED if _seen.get(name) is not None]
    if beyond or (windowed and "sliding_window" not in _seen):
        return f"{type(model.base).__name__}'s attention has what packing hasn't ({', '.join(beyond) or 'a window'})"
    return ""
