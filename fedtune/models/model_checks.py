"""What a base turns out to be once it is loaded, so that what would go wrong later, or in silence, is said at once.

One short text goes through the model, forwards and back; its tokenizer is held against its vocabulary; and what it is
held in is counted.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.config.schema import AdapterSpec
from fedtune.core.errors import ModelError
from fedtune.core.text import first_line
from fedtune.data.corpus import Corpus

LENGTH = 12  # tokens of the text
UNHEARD = 1e-6  # of the first half's influence on its own predictions: what rounding could make of nothing
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


def check_config(name: str, config: Any) -> None:
    """Refuse a model that predicts no next token, before its weights are loaded.

    Raises:
        ModelError: if it isn't the config of a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    made_for = config.architectures or []
    kind = made_for[0] if made_for else type(config).__name__
    causal = [each for each in made_for if each.endswith(("ForCausalLM", "LMHeadModel"))]
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (causal or not made_for):
        return
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "vision_config"):
        raise ModelError(
            f"{name} is {kind}, a vision-language model, and fedtune trains models of text alone: take its family's "
            "text model, or save its language part as a causal language model of its own"
        )
    raise ModelError(
        f"{name} is {kind}, not a causal language model (one that predicts the next token): "
        "expected something like LlamaForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel"
    )


def check_quantization(name: str, config: Any, asked: str) -> str:
    """How the base's files hold it: "none", or what they were quantized to, which is then what it is.

    Raises:
        ModelError: if they are quantized and another kind is asked for.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "none"
    given = found if isinstance(found, dict) else found.to_dict()
    held = str(given.get("quant_method") or "quantized")
    if given.get("load_in_8bit"):
        held = "int8"
    elif given.get("load_in_4bit"):
        held = str(given.get("bnb_4bit_quant_type", "fp4"))
    if asked not in ("none", held):
        raise ModelError(
            f"model.quantization={asked}, and the files of {name} are quantized already, to {held}, which nothing "
            "makes whole again: leave model.quantization out, or take the model that isn't quantized"
        )
    return held


@contextmanager
def modules_reached(model: nn.Module) -> Iterator[set[str]]:
    """The whole names of the modules that are gone through within this."""
    reached: set[str] = set()
    with ExitStack() as stack:
        for each, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, each=each: reached.add(each)).remove)
        yield reached


def examine(model: Any, name: str, held: str = "none") -> frozenset[str] | None:
    """Send one short text through the model, forwards and back, as it trains.

    Args:
        held: what the model is held in.

    Returns:
        The whole names of the modules that it went through; None where the model doesn't say.

    Raises:
        ModelError: if a prediction depends on tokens that come after it, or the model can't take a text.
    """
    device = next(model.parameters()).device
    embeddings = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    tokens = (torch.arange(LENGTH) * 7 + 3).remainder(rows)[None].to(device)
    heard: list[Tensor] = []

    def listen(_: nn.Module, inputs: Any, output: Any) -> Any:
        if heard or not isinstance(output, Tensor):
            return output
        heard.append(output.detach().requires_grad_())
        return heard[0].clone()  # some models add to it in place

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        stack.callback(_as_before_use, model)
        reached = stack.enter_context(modules_reached(model))
        stack.callback(embeddings.register_forward_hook(listen).remove)
        model.train()
        stack.callback(model.eval)
        try:
            logits = model(input_ids=tokens, use_cache=False).logits[0].float()
            logits[: LENGTH // 2].square().sum().backward()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, ImportError) as error:
            reason = first_line(error).rstrip(".")
            way_out = "" if held == "none" else f". It is held in {held}: try model.quantization=none"
            raise ModelError(
                f"{name} can't take a text of {LENGTH} tokens, forwards and back: {reason}{way_out}"
            ) from error
    if heard and (gradient := heard[0].grad) is not None:
        influence = gradient.float().abs().sum(-1).flatten()
        before, after = influence[: LENGTH // 2].max(), influence[LENGTH // 2 :].max()
        if after > UNHEARD * before:
            raise ModelError(
                f"{name} is no causal language model as it stands: a later token moves the predictions before it, so "
                "it would be trained on what it has to predict. Of an encoder, as BERT, its config has to say "
                "is_decoder=true"
            )
    return frozenset(reached)


def check_tokenizer(tokenizer: Any, name: str, where: str, rows: int) -> int:
    """Which token pads: the tokenizer's, else one that the model has. A tokenizer without one pads with its eos.

    Args:
        where: the folder that the tokenizer was looked for in.
        rows: of the model's embeddings.

    Raises:
        ModelError: if the tokenizer has no words, or names tokens that the model doesn't have.
    """
    special = set(tokenizer.all_special_ids)
    if not set(tokenizer.get_vocab().values()) - special:
        raise no_tokenizer(name, where)
    for kind in ("bos_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, kind)) is not None and token >= rows:
            raise ModelError(
                f"{name}: the tokenizer's {kind} is {token}, and the model has rows for tokens 0 to {rows - 1}: they "
                "don't belong together, or the model's embeddings have to be made larger (resize_token_embeddings)"
            )
    fitting = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(special), 0)
    pad = next(int(token) for token in fitting if token is not None and token < rows)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return pad


def no_tokenizer(name: str, where: str, reason: str = "") -> ModelError:
    """The error of a model without a tokenizer, or with one that can't be read."""
    folder = Path(where)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        reason = ""
    what = f"has a tokenizer that can't be read: {reason}" if reason else "has no tokenizer"
    return ModelError(
        f"{name} {what}. It was looked for in {where}: expected {', '.join(TOKENIZER_FILES[:4])} or the like there, as "
        "tokenizer.save_pretrained writes them"
    )


def check_tokens(corpus: Corpus, model: Any) -> None:
    """Check that the model has an embedding for every token of the data.

    Raises:
        ModelError: if an example has a token that the model has no row for.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    for tokens in (corpus.tokens, *(span for each in corpus.questions.values() for span, _ in each.options)):
        if len(tokens) and (highest := int(tokens.max())) >= rows:
            raise ModelError(
                f"the tokenizer makes token {highest} of the data, and the model has rows for tokens 0 to {rows - 1}: "
                "they don't belong together, or the model's embeddings have to be made larger "
                "(resize_token_embeddings)"
            )


def positions_for(model: Any, adapter: AdapterSpec) -> int | None:
    """How many tokens an example can have beside the adapter's own; None where there is no such limit.

    Raises:
        ModelError: if the adapter leaves no room for any.
    """
    if (positions := positions_of(model)) is None:
        return None
    room = positions - (adapter.tokens if adapter.kind in ("prompt_tuning", "prefix_tuning") else 0)
    if room < 2:
        raise ModelError(f"adapter.tokens={adapter.tokens}: the model has positions for {positions} tokens in all")
    return room


def positions_of(model: Any) -> int | None:
    """How many tokens a text can have at most: as many as the model's table of positions has rows; None where it has
    no such table, as with rotary positions, which go on beyond what the model was trained with."""
    config = model.config.get_text_config()
    if config.model_type == "mpt":  # ALiBi, but of a fixed length
        return int(config.max_seq_len)
    limit = getattr(config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    found: list[int] = []
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and module is not words and ("pos" in last or last == "wpe"):
            # Some count from behind the rows of padding
            taken = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - int(taken))
        for held, table in _tensors(module):
            if "pos" in held and table.dim() == 2 and limit is not None and table.shape[0] == limit:
                found.append(int(limit))
    return min(found, default=None)


def quantized_share(model: Any) -> float:
    """The share of the weights, the vocabulary's aside, that bitsandbytes holds as 4 or 8 bits."""
    quantized, others = _held(model)
    whole = quantized + sum(weight.numel() for _, weight in others)
    return quantized / whole if whole else 1.0


def check_share(name: str, model: Any, kind: str, least: float) -> str:
    """What to say of how much of the base is quantized.

    Raises:
        ModelError: if that is less than `least`.
    """
    if kind not in ("nf4", "fp4", "int8"):  # not by bitsandbytes
        return f"{name}: its files hold it as {kind}"
    share = quantized_share(model)
    said = f"{share:.0%} of its weights, the vocabulary's aside, are held in {kind}"
    if share < least:
        largest = max(_held(model)[1], key=lambda each: each[1].numel())[0]
        raise ModelError(
            f"{name}: {said}. bitsandbytes quantizes layers, and most of these weights are in none, as {largest}. Set "
            f"model.min_quantized={int(share * 100) / 100:g} to take it so, or model.quantization=none"
        )
    return f"{name}: {said}"


def _held(model: Any) -> tuple[int, list[tuple[str, Tensor]]]:
    """How many weights are in quantized layers; and the other matrices, but for the vocabulary's."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    quantized, others = 0, []
    for place, module in model.named_modules():
        codes = type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        for name, weight in module.named_parameters(recurse=False):
            if codes and name == "weight":
                quantized += module.in_features * module.out_features
            elif weight.dim() > 1 and id(weight) not in vocabulary:
                others.append((f"{place}.{name}", weight))
    return quantized, others


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(recurse=False)
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def _as_before_use(model: nn.Module) -> None:
    """bitsandbytes' int8 layers take their scales from the weight when they are first used; put them back, for a copy
    of the model (fedtune/models/shared_base.py) looks for them there."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            layer: Any = module
            if layer.weight.CB is None and layer.state.CB is not None:
                layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
                layer.state.CB = layer.state.SCB = None
