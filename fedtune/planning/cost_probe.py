"""What a step takes on the base at hand: the figures behind plans and the virtual clock, taken from the model itself.

One example goes through the frozen base, forward only. Which tensors the backward pass would need is what autograd
keeps; how much there is to multiply is what each layer is handed. So it holds for any architecture, on any device, and
for a base in any precision. What a module multiplies without a layer for it, as some mixtures of experts, isn't seen.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedtune.core.costs import Costs, Weight
from fedtune.core.seeds import derive_seed, permutation
from fedtune.data.federated_data import FederatedData
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.training.gradients import seeded

NF4_BYTES = 0.516  # a parameter: 4 bits, and absmax of each 64 in 8 bits, double quantization
ALLOCATOR = 1.3  # what an allocator and short-lived copies take, over what a step keeps; measured: docs/planning.md
FIXED_BYTES = 110e6  # libraries' workspaces and what else a process has only once it trains; measured likewise
LOGIT_BYTES = 14.0  # a logit in the model's 16 bits; in float32 its log-probability, and two gradients
SLOWDOWN = {"4": 1.1, "8": 1.2, "16": 1.0, "32": 1.0}  # a step beside one in 16 bits; measured likewise
QUANTIZED = ("Linear4bit", "Linear8bitLt")
SAMPLED = 64  # batches whose padded length is averaged


def costs_of(model: LocalModel, data: FederatedData, batch_size: int, seed: int, longest: int = 0) -> Costs:
    """What training this model on these data takes. The model is left as it was.

    Args:
        batch_size: examples that are padded to one length.
        longest: tokens of an example at most: what is reckoned with where no training rows are known here.
    """
    rows = np.concatenate(data.train)
    lengths, learnt = np.diff(data.corpus.starts), _supervised(data)
    if not len(rows):
        rows, lengths, learnt = np.zeros(1, dtype=np.int64), np.array([longest]), np.array([longest - 1])
    padded, answers = _typical(lengths, learnt, rows, batch_size, derive_seed(seed, "costs"))
    base = model.base
    blocks = blocks_of(base)
    with _bare(model):
        linear = _work(base, blocks, round(padded))
        saved = _saved(base, blocks, int(lengths[rows].max()))
        borders = _borders(base, blocks, int(lengths[rows].max())) if model.checkpoints else []
    head = base.get_output_embeddings()
    vocabulary, width = head.weight.shape if head is not None else (0, 0)
    head_flop = 2.0 * vocabulary * width * answers
    # Causal attention: half of Q K^T and of its product with V; backward, flash attention does 5 products for these 2
    attention = 2.0 * padded**2 * _attention_width(base)
    forward = [flop + attention for flop in linear]
    backward = [flop + 2.5 * attention for flop in linear]
    names = list(blocks)
    wide = 4.0 if base.dtype == torch.float32 else 2.0
    sizes = [0] * len(blocks)
    for name, (_, out, width_in) in _linear(base).items():
        sizes[_block(name, names)] += out * width_in
    tokens = float(lengths[rows].max())
    again, per_byte = 0.0, ALLOCATOR * 4.0
    if model.checkpoints:
        # Kept are the blocks' inputs; on the way back one block at a time is computed again, LoRA's part of it too
        again, per_byte = 1.0, 0.0
        inside = [one + tokens * 4.0 * lora for one, lora in zip(saved, _lora_columns(model), strict=True)]
        kept = [sum(borders[place:]) + max(inside[place:]) for place in range(len(blocks))]
    else:
        kept = [sum(saved[place:]) for place in range(len(blocks))]
    return Costs(
        base_bytes=base_bytes(model),
        slowdown=dict(SLOWDOWN),
        tokens=tokens,
        typical_tokens=padded,
        forward_flop=sum(forward) + head_flop,
        backward_flop=[
            head_flop + sum(backward[place:]) + again * sum(forward[place:]) for place in range(len(blocks))
        ],
        saved_bytes=[ALLOCATOR * bytes_of for bytes_of in kept],
        head_bytes=ALLOCATOR * LOGIT_BYTES * vocabulary * float(learnt[rows].max()),
        fixed_bytes=FIXED_BYTES,
        read_bytes=[
            wide * (sum(sizes) + (1 + again) * sum(sizes[place:]) + 2 * vocabulary * width)
            for place in range(len(blocks))
        ],
        input_bytes=per_byte,
        inner_bytes=per_byte,
    )


def weights_of(model: LocalModel) -> list[Weight]:
    """The layers that have a LoRA adapter, and where in the base they are."""
    names = list(blocks_of(model.base))
    return [
        Weight(module, _block(module, names), product.b.shape[0], product.a.shape[1])
        for module, product in lora_factors(model.layout.initial).items()
    ]


def blocks_of(base: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name, from the input to the output; where nothing repeats, the whole as one."""
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    # A block's own lists, as of its experts, may be longer
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return {"": base}
    name = max(outer, key=lambda name: len(lists[name]))
    longest = lists[name]
    return {f"{name}.{place}": block for place, block in enumerate(longest)}


def base_bytes(model: LocalModel) -> dict[str, float]:
    """The frozen base in memory, by the bits that its layers could be held in. The vocabulary's stay as they are, and
    so does what is in no layer, as fused experts: where that is most of the model, fewer bits aren't offered."""
    base = model.base
    layers = list(_linear(base).values())
    if model.quantization != "none":  # some are left as they are
        layers = [each for each in layers if type(each[0]).__name__ in QUANTIZED] or layers
    linear = sum(rows * columns for _, rows, columns in layers)
    known = {id(layer.weight) for layer, _, _ in layers} | {id(p) for own in _adapters(base) for p in own.parameters()}
    rest = [p for p in base.parameters() if id(p) not in known]
    beside = float(sum(p.numel() * p.element_size() for p in rest))
    wide = 4.0 if base.dtype == torch.float32 else 2.0
    whole = {"32" if wide == 4 else "16": linear * wide + beside}
    parts = (base.get_input_embeddings(), base.get_output_embeddings())
    vocabulary = {id(part.weight) for part in parts if part is not None}
    apart = sum(p.numel() for p in rest if id(p) not in vocabulary)
    if model.origin.path is None or (model.quantization == "none" and linear < apart):
        return whole  # made in code, there is no file to read in other bits
    held = {"4": linear * NF4_BYTES + beside, "8": linear + beside, **whole}
    if getattr(getattr(base, "hf_quantizer", None), "pre_quantized", False):  # its file has no other bits
        bits = "4" if getattr(base, "is_loaded_in_4bit", False) else "8"
        return {bits: held[bits]}
    return held


@contextmanager
def _bare(model: LocalModel) -> Iterator[None]:
    """The base without its adapters, if it has any, as it is when it trains: a dropout of its own keeps masks."""
    modules = list(model.module.modules())
    modes = [(module, module.training) for module in modules]
    frozen = [parameter for parameter in model.module.parameters() if not parameter.requires_grad]
    off = [layer for layer in modules if hasattr(layer, "get_base_layer") and layer.disable_adapters is True]
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # layers that are switched off already
            if hasattr(model.module, "disable_adapter"):
                stack.enter_context(model.module.disable_adapter())
            stack.enter_context(seeded(0, model.device))
            model.base.train()
            for module in modules:  # what a block keeps is to be seen
                if getattr(module, "gradient_checkpointing", False):
                    stack.callback(setattr, module, "gradient_checkpointing", True)
                    module.gradient_checkpointing = False
            yield
    finally:
        for layer in off:
            layer.enable_adapters(False)
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training


def _supervised(data: FederatedData) -> np.ndarray:
    """[example]: its tokens whose loss counts; the first has none to be told from."""
    corpus = data.corpus
    before = np.concatenate([[0], np.cumsum(corpus.targets)])
    found: np.ndarray = before[corpus.starts[1:]] - before[np.minimum(corpus.starts[:-1] + 1, corpus.starts[1:])]
    return found


def _typical(
    lengths: np.ndarray, learnt: np.ndarray, rows: np.ndarray, batch_size: int, key: int
) -> tuple[float, float]:
    """Mean over batches: the length that examples are padded to, and the tokens of an example that are learnt."""
    epochs = -(-SAMPLED * batch_size // len(rows))
    order = np.concatenate([permutation(derive_seed(key, epoch), len(rows)) for epoch in range(epochs)])
    drawn = rows[order[: SAMPLED * batch_size]]
    padded = lengths[drawn].reshape(SAMPLED, batch_size).max(1)
    return float(padded.mean()), float(learnt[drawn].mean())


def _adapters(base: nn.Module) -> list[nn.Module]:
    """What PEFT put beside the base's layers."""
    return [
        module
        for layer in base.modules()
        if hasattr(layer, "get_base_layer")
        for name, module in layer.named_modules()
        if name and not name.startswith("base_layer")
    ]


def _linear(base: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """The base's own matrices but for the vocabulary's, by name, with outputs and inputs; quantized ones too."""
    beside = {id(module) for module in _adapters(base)}
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        beside |= {id(module) for module in head.modules()}  # it may be adapted, and is then inside of that
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for name, layer in base.named_modules():
        if id(layer) in beside or hasattr(layer, "get_base_layer"):
            continue
        own: Any = layer
        if type(layer).__name__ == "Conv1D":
            found[name] = (layer, int(own.weight.shape[1]), int(own.weight.shape[0]))
        elif hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            found[name] = (layer, int(own.out_features), int(own.in_features))
    return found


def _block(module: str, blocks: list[str]) -> int:
    """The place of the block that a layer is in; 0, from where nothing is left out, for one that is in none."""
    name = module.removeprefix("base_model.model.")
    return next((place for place, block in enumerate(blocks) if f"{name}.".startswith(f"{block}.")), 0)


def _embedded(base: Any, length: int) -> Tensor:
    """One example of that many tokens as the first block gets it, which has gradients pass all blocks."""
    embeddings = base.get_input_embeddings()
    tokens = torch.zeros(1, length, dtype=torch.int64, device=embeddings.weight.device)
    embedded: Tensor = embeddings(tokens).detach().requires_grad_()
    return embedded.clone()  # some models add to it in place


def _forward(base: Any, embedded: Tensor) -> None:
    """Up to, but for one token, the vocabulary's projection."""
    with ExitStack() as stack:
        if (head := base.get_output_embeddings()) is not None:
            handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
            stack.callback(handle.remove)
        base(inputs_embeds=embedded, use_cache=False)


def _work(base: nn.Module, blocks: Mapping[str, nn.Module], length: int) -> list[float]:
    """Floating-point operations of each block's matrices on one example, forward."""
    flop = [0.0] * len(blocks)
    names = list(blocks)
    with ExitStack() as stack, torch.no_grad():
        for name, (layer, rows, columns) in _linear(base).items():

            def count(
                _: Any,
                inputs: tuple[Tensor, ...],
                at: int = _block(name, names),
                work: int = 2 * rows,
                width: int = columns,
            ) -> None:
                flop[at] += work * width * (inputs[0].numel() // width)

            stack.callback(layer.register_forward_pre_hook(count).remove)
        _forward(base, _embedded(base, length))
    return flop


def _saved(base: nn.Module, blocks: Mapping[str, nn.Module], length: int) -> list[float]:
    """Bytes that autograd keeps of each block for one example."""
    held = [0.0] * len(blocks)
    own = {t.untyped_storage()._cdata for t in (*base.parameters(), *base.buffers())}
    kept: list[Tensor] = []  # alive to the end, so that no storage comes twice
    at = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            own.add(storage._cdata)
            kept.append(tensor)
            held[at] += storage.nbytes()
        return tensor

    def enter(place: int) -> None:
        nonlocal at
        at = place

    with ExitStack() as stack:
        for place, block in enumerate(blocks.values()):
            stack.callback(block.register_forward_pre_hook(lambda *_, place=place: enter(place)).remove)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            _forward(base, _embedded(base, length))
    return held


def _borders(base: nn.Module, blocks: Mapping[str, nn.Module], length: int) -> list[float]:
    """Bytes of what each block is handed of one example."""
    found = [0.0] * len(blocks)

    def measure(_: Any, inputs: tuple[Any, ...], place: int) -> None:
        found[place] = float(sum(each.nbytes for each in inputs if isinstance(each, Tensor)))

    with ExitStack() as stack, torch.no_grad():
        for place, block in enumerate(blocks.values()):
            stack.callback(block.register_forward_pre_hook(partial(measure, place=place)).remove)
        _forward(base, _embedded(base, length))
    return found


def _lora_columns(model: LocalModel) -> list[int]:
    """[block]: numbers a token that its LoRA layers keep, if all of them are trained at their full rank."""
    found = [0] * len(blocks_of(model.base))
    for module, product in lora_factors(model.layout.initial).items():
        found[_block(module, list(blocks_of(model.base)))] += sum(product.a.shape)
    return found


def _attention_width(base: Any) -> float:
    """Columns of Q, over all heads, times the number of products that each block makes with them: one."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    return float(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
