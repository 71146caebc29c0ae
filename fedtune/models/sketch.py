"""A base without its weights: what its config says of it, for plans made before anything large is downloaded or read.

Its numbers are torch's fake tensors. These have shapes, dtypes and devices, and what is computed of them is such a
tensor again, so that adapters can be attached and a text's way through the model be followed, in no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from fedtune.config.schema import ModelSpec
from fedtune.models.attention import check_attention, with_attention
from fedtune.models.base import Base, Origin, locate, pick_dtype, quiet
from fedtune.models.model_checks import LENGTH, check_config, check_quantization, check_tokenizer, modules_reached

# Measured (tests/test_sketch.py): times what is held in the end, while a base is quantized; bytes for each number of a
# quantized layer while it is used, one layer at a time: bitsandbytes makes it float32 on a CPU, and torch packs that
WHILE_QUANTIZED = 1.3
IN_USE = 18


@dataclass(frozen=True)
class Sketch:
    """What there is to know of a base before it is loaded."""

    base: Base
    largest_file: int  # bytes; weights are read one file at a time. 0 where nobody says
    largest_layer: int  # numbers

    def loading_bytes(self, held: float, bits: int) -> float:
        """The most that loading takes of this process's memory, in bytes; the text that a base is tried with included.

        Args:
            held: bytes of the base once it is loaded, in so many bits.
        """
        if bits > 8:
            return held + self.largest_file
        return max(WHILE_QUANTIZED * held + self.largest_file, held + IN_USE * self.largest_layer)


def sketch_base(spec: ModelSpec, device: torch.device) -> Sketch | None:
    """The base that `spec` names, without its weights; of a hub's, config and tokenizer are downloaded.

    Returns:
        None of a base that has to be loaded to be known: one whose files hold it quantized, and one whose code asks for
        its numbers.

    Raises:
        ModelError: if there is no such model, or it isn't a causal language model.
    """
    quiet()
    origin = locate(spec, weights=False)
    where = str(origin.path)
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = pick_dtype(spec.dtype, device)
    check_attention(spec.attention, device, dtype)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        check_config(str(spec.path), config)
        if check_quantization(str(spec.path), config, spec.quantization) != "none":
            return None
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), with_attention(spec.attention) as asked:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **asked)
        model.eval().requires_grad_(False)
        model.forward = _of_one_text(model.forward)
        with modules_reached(model) as reached, torch.no_grad():
            model(input_ids=torch.zeros(1, LENGTH, dtype=torch.int64, device=device), use_cache=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError):
        return None  # whatever is wrong, loading it says so
    pad = check_tokenizer(tokenizer, str(spec.path), where, len(model.get_input_embeddings().weight))
    base = Base(model, tokenizer, origin, pad, spec.quantization, frozenset(reached))
    vocabulary = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    layers = [each.numel() for each in model.parameters() if each.dim() > 1 and id(each) not in vocabulary]
    return Sketch(base, _largest_file(origin, spec), max(layers, default=0))


def _of_one_text(forward: Callable[..., Any]) -> Callable[..., Any]:
    """transformers looks at the positions' numbers, to see whether several texts follow one another in a row, and
    without numbers takes it that they may."""
    from transformers import masking_utils

    @wraps(forward)
    def run(*words: Any, **options: Any) -> Any:
        looks: Any = masking_utils
        found = getattr(looks, "find_packed_sequence_indices", None)
        looks.find_packed_sequence_indices = lambda *_, **__: None
        try:
            return forward(*words, **options)
        finally:
            looks.find_packed_sequence_indices = found

    return run


def _largest_file(origin: Origin, spec: ModelSpec) -> int:
    sizes = [file.stat().st_size for file in Path(str(origin.path)).glob("*.safetensors")]
    if not sizes and origin.hub_id is not None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            files = HfApi().model_info(origin.hub_id, revision=spec.revision, files_metadata=True).siblings or []
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            files = []
        sizes = [
            file.size or 0 for file in files if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
        ]
    return max(sizes, default=0)
