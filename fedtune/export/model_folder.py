"""`fedtune export`: a run's model as a Hugging Face folder, for everything that reads such folders.

The model is made as a client's is: a fresh base that receives what the server would send to a newcomer, from the run's
checkpoint or from its model.fedtune. Without an adapter that is the model, to the bit; an adapter is merged into the
base, which rounds each weight once to the base's dtype.
"""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.config.compatibility import traits_of
from fedtune.config.compose import load_file
from fedtune.config.schema import FULL, Experiment
from fedtune.core.errors import ExportError, ModelError
from fedtune.core.files import beside, new_folder
from fedtune.core.protocol import ClientInfo
from fedtune.core.seeds import bits, derive_seed
from fedtune.device.owner import user
from fedtune.models.adapted_model import LocalModel
from fedtune.models.attention import lacking
from fedtune.models.base import Base, Origin, load_base, pick_device, pick_dtype
from fedtune.planning.population import assign_rank, profile_of
from fedtune.runs.adapter_files import adapter_files
from fedtune.runs.checkpoint import Checkpoint, load_checkpoint
from fedtune.runs.model_file import NAME, TunedModel, malformed, read
from fedtune.runs.run_folder import BEST, ROUNDS
from fedtune.training.client_state import ClientStateStore
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace

ROUNDING = {torch.float32: 1e-3}  # of the logits' spread, that merging and another order of sums may change
COARSE = 0.25  # in 16 bits, over all layers: 0.075 in SmolLM2's 210 of them
PROMPTS = ("adaption_prompt", "prompt_tuning", "prefix_tuning")  # kinds that add tokens, and change no weight


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    experiment: Experiment
    round: int
    origin: Origin  # of the base, as it was found here


@dataclass(frozen=True)
class Source:
    """What to export: a file's content, or a run whose state is still to be read, which takes the model's layout."""

    path: Path
    experiment: Experiment
    origin: Origin
    dtype: str
    file: TunedModel | None
    data: Mapping[str, Any] = field(default_factory=dict)  # what summary.json says of the run's data


def export(source: str, out: str, base: str | None = None, round: str | None = None) -> Exported:
    """Write the model of a run, or of a .fedtune file, into a new folder.

    Args:
        base: where the base is on this machine (a folder, a GGUF file or a hub id), if not where the run found it.
        round: as for `source_of`.

    Raises:
        FedtuneError: if there is nothing to export, it can't be one model, the base isn't here or is another, or `out`
            can't be written; nothing is left of `out` then.
    """
    target = new_folder(out)
    found = source_of(Path(source).expanduser(), round)
    workspace = workspace_for(found, base)
    experiment = workspace.experiment
    _check_exportable(found, workspace)
    local, number = tuned(found, workspace)
    _check_weights(local)
    model, tokenizer, origin, device = local.module, local.tokenizer, local.origin, local.device
    expected = _predictions(model, device)
    files = adapter_files(local)
    kept: dict[str, str] = {}
    adapted = {slot.module.removeprefix("base_model.model.") for slot in local.layout.slots}
    del local, workspace
    if experiment.adapter.kind != FULL:
        del model  # this base has adapters in it. It goes before a fresh one is read
        fresh = _base(found, experiment)
        kept = {name: each for name, each in _hashes(fresh.model).items() if name.rpartition(".")[0] not in adapted}
        model = _merged(fresh, files)
        del fresh
    with beside(target) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        del model
        _check_written(unfinished, target, device, expected, kept)
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Exported(target, written, found.experiment, number, origin)


def source_of(path: Path, round: str | None = None) -> Source:
    """What `path` is: a run folder, or a .fedtune file.

    Args:
        round: of a run's folder, the round to take of those that it kept: its number, or "best"; None: the last.

    Raises:
        ExportError: if it is neither, a run that has finished no round, or one that didn't keep that round.
    """
    if round is not None:
        return _kept(path, round)
    if path.is_file():
        file = read(path)
        return Source(path, file.experiment, file.origin, file.dtype, file)
    if not path.exists():
        raise ExportError(f"{path} does not exist: give a run's folder, or a .fedtune file")
    stored = path / "config.yaml"
    if not stored.is_file():
        raise ExportError(f"{path} holds no run (no config.yaml): give the folder that out= named, or a .fedtune file")
    if not _state(path).is_file():
        if (path / NAME).is_file():  # all that is needed, if somebody made room by deleting the checkpoint
            return source_of(path / NAME)
        raise ExportError(
            f"{path} has no checkpoint, and so no model yet: not even round 0 is done. "
            f"Go on with it: fedtune run resume={path}"
        )
    experiment = load_file(stored)
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        base = summary["base"]
        origin = Origin(base["source"], base["sha256"], None, base["hub_id"])
        return Source(path, experiment, origin, base["dtype"], None, dict(summary.get("data", {})))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path}/summary.json doesn't say which base the run was on ({type(error).__name__}: {error}): "
            f"fedtune run resume={path} writes it again"
        ) from error


def _kept(run: Path, round: str) -> Source:
    folder = run / BEST if round == BEST else run / ROUNDS / round
    if not re.fullmatch(rf"{BEST}|[0-9]{{1,18}}", round) or not (folder / NAME).is_file():
        kept = sorted(
            (each.parent.name for each in (run / ROUNDS).glob(f"*/{NAME}")), key=lambda name: (len(name), name)
        )
        named = ", ".join([*kept, *([BEST] if (run / BEST / NAME).is_file() else [])])
        raise ExportError(
            f"--round {round}: {run} kept {named or 'no round'} beside the last. A run keeps rounds where keep.every=N "
            "or keep.best=true says so"
        )
    last = source_of(run)
    return replace(source_of(folder / NAME), data=last.data)


def workspace_for(found: Source, base: str | None, **settings: Any) -> Workspace:
    """A workspace of the run, which has loaded nothing yet: on whatever device is here, in the dtype that `auto` was
    where the run was made, and with the run's attention where this machine has it.

    Args:
        base: where the base is on this machine, if not where the run found it.
        settings: sections of the experiment that are to be others, as evaluate.
    """
    spec, device = replace(found.experiment.model, dtype=found.dtype), pick_device("auto")
    if lacking(spec.attention, device, pick_dtype(spec.dtype, device)):
        spec = replace(spec, attention="auto")
    if base is not None:
        spec = replace(spec, path=base, revision=None)
    runtime = replace(found.experiment.runtime, device="auto")
    with malformed(found.path):
        return Workspace(replace(found.experiment, model=spec, runtime=runtime, **settings), user())


def check_one_model(found: Source, workspace: Workspace) -> None:
    """Check that what the server holds is one whole model.

    Raises:
        ExportError: if the run left parts of the model with its clients.
    """
    if traits_of(workspace.strategy).personal:
        raise ExportError(
            f"method={found.experiment.method_name} leaves a part of the model with each client: there are as many "
            "models as clients, and what the server has of them is not one. What each is worth is in the run's "
            "clients.csv"
        )


def _check_exportable(found: Source, workspace: Workspace) -> None:
    """Raises:
    ExportError: if there is no one model, or none that can be written as the base's weights.
    """
    experiment = found.experiment
    kind, quantization = experiment.adapter.kind, experiment.model.quantization
    check_one_model(found, workspace)
    if kind in PROMPTS:
        raise ExportError(
            f"adapter={kind} adds virtual tokens and changes no weight, so it can't be merged into the base: load the "
            "run's adapter/ folder with PeftModel.from_pretrained"
        )
    if quantization != "none":
        raise ExportError(
            f"the base was held in {quantization}, whose codes can't take up a small change without rounding it away: "
            "load the run's adapter/ folder with PeftModel.from_pretrained, on the base held in the same way"
        )


def _check_weights(local: LocalModel) -> None:
    """Raises:
    ExportError: if they are codes.
    """
    if getattr(local.module, "is_quantized", False):  # also of a folder or hub model that was saved so
        raise ExportError(
            f"{local.origin.source} is quantized, and codes can't take up a small change without rounding it away: "
            "load the run's adapter/ folder with PeftModel.from_pretrained"
        )


def tuned(found: Source, workspace: Workspace) -> tuple[LocalModel, int]:
    """The model, and the last round that is in it.

    Raises:
        FedtuneError: if it can't be made here.
    """
    base = _base(found, workspace.experiment)
    with malformed(found.path):
        workspace.take(base)
        if found.file is not None:
            workspace.install(found.file.instruction, memory={})
            return workspace.model, found.file.round
    checkpoint = _checkpoint(found, workspace)
    broadcast = Downlink(workspace).broadcast(checkpoint.sent, checkpoint.state, checkpoint.round + 1)
    workspace.install(broadcast, memory={})
    return workspace.model, checkpoint.round


def client_model(found: Source, workspace: Workspace, client: int) -> tuple[LocalModel, int]:
    """What a client of a simulation holds after the last round, and that round: what it would be sent, and its own.

    Raises:
        FedtuneError: if clients have no models of their own, there is no such client, or it is on another machine.
    """
    experiment = workspace.experiment
    if not traits_of(workspace.strategy).personal:
        raise ExportError(
            f"--client {client}: with method={experiment.method_name} all clients have one model: leave out --client"
        )
    if not 0 <= client < experiment.population.clients:
        raise ExportError(f"--client {client}: the run has clients 0 to {experiment.population.clients - 1}")
    if found.file is not None or experiment.runtime.name == "flower":
        raise ExportError(
            f"--client {client}: what a client keeps for itself is on its own machine, and not in {found.path}"
        )
    with malformed(found.path):
        workspace.take(_base(found, experiment))
    checkpoint = _checkpoint(found, workspace)
    downlink, number = Downlink(workspace), checkpoint.round + 1
    if experiment.population.ranks is None:
        told = downlink.broadcast(checkpoint.sent, checkpoint.state, number)
    else:
        able = ClientInfo(client, 1, profile_of(client, experiment))
        peer = assign_rank(able, experiment, workspace.model.layout)
        meant = workspace.strategy.configure(checkpoint.state, number, peer)
        told = downlink.encode(meant, number, checkpoint.run).decoded
    kept = ClientStateStore(found.path / "clients", found.path)  # a workspace of a user's would look in their home
    memory = kept.load(checkpoint.run, client, number)
    return workspace.install(told, memory), checkpoint.round


def _checkpoint(found: Source, workspace: Workspace) -> Checkpoint:
    checkpoint = load_checkpoint(_state(found.path), workspace.strategy.init(workspace.model.layout))
    if checkpoint.config_sha256 != found.experiment.sha256:
        raise ExportError(
            f"{found.path} was run with other settings than its config.yaml has now: put back what was changed"
        )
    return checkpoint


def _base(found: Source, experiment: Experiment) -> Base:
    """The base, as it is on this machine.

    Raises:
        ExportError: if it isn't here, or has other weights.
    """
    expected = f"{found.origin.source} (sha256 {found.origin.sha256[:16]}...)"
    try:
        runtime = experiment.runtime
        base = load_base(experiment.model, pick_device(runtime.device, runtime.deterministic))
    except ModelError as error:
        raise ExportError(
            f"the model was tuned from {expected}, which isn't to be had here: {error}. "
            "Name where it is with --base: a folder, a GGUF file or a hub id"
        ) from error
    if base.origin.sha256 != found.origin.sha256:
        raise ExportError(
            f"the model was tuned from {expected}; here is {base.origin.source} (sha256 {base.origin.sha256[:16]}...), "
            "whose weights are others. Name where the right ones are with --base: a folder, a GGUF file or a hub id"
        )
    return base


def _merged(base: Base, files: dict[str, bytes]) -> Any:
    """The base with the adapter in its weights, changes of the base that belong to it included."""
    from peft import PeftModel

    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="fedtune-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        warnings.simplefilter("ignore")  # about tied weights, which come apart here
        adapted = PeftModel.from_pretrained(base.model, folder)
    _take_apart(adapted)
    return adapted.merge_and_unload()


def _take_apart(adapted: Any) -> None:
    """Give each adapted layer a weight of its own. One that it shares, as a head does with the embeddings where these
    are tied, would take up the adapter for the others too, which were trained without it."""
    holders: dict[int, int] = {}
    for _, weight in adapted.named_parameters(remove_duplicate=False):
        holders[id(weight)] = holders.get(id(weight), 0) + 1
    for layer in adapted.modules():
        if hasattr(layer, "get_base_layer") and holders.get(id(weight := layer.get_base_layer().weight), 1) > 1:
            layer.get_base_layer().weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            for config in (adapted.config, adapted.config.get_text_config()):
                config.tie_word_embeddings = False


def _predictions(model: Any, device: torch.device) -> Tensor:
    """The logits of a few tokens drawn by key, (2, 16, vocabulary) float32, on the CPU."""
    rows = model.get_input_embeddings().weight.shape[0]
    words = torch.from_numpy(bits(derive_seed(0, "export"), 32) % rows).to(torch.int64).reshape(2, 16)
    with torch.inference_mode():
        logits: Tensor = model.eval()(input_ids=words.to(device), use_cache=False).logits
    return logits.float().cpu()


def _hashes(model: Any) -> dict[str, str]:
    """Of every weight, by each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    bytes_of = {name: weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for name, weight in named}
    return {name: hashlib.sha256(content.numpy()).hexdigest() for name, content in bytes_of.items()}


def _check_written(folder: Path, target: Path, device: torch.device, expected: Tensor, kept: Mapping[str, str]) -> None:
    """Read the folder as anybody would, and compare.

    Args:
        expected: the run's predictions.
        kept: hashes of the weights that are the base's to the bit.

    Raises:
        ExportError: if it is not the run's model, beyond what rounding the weights once explains.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).to(device)
    if changed := [name for name, each in _hashes(model).items() if kept.get(name, each) != each]:
        raise ExportError(
            f"{target} isn't written: read again, '{changed[0]}' is not the base's, and the run has no adapter on it. "
            "That is a fault of fedtune's or of a library's: please report the base and the adapter's settings. The "
            "run itself is not concerned"
        )
    got = _predictions(model, device)
    off = float((got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())
    if not off <= ROUNDING.get(model.dtype, COARSE):
        raise ExportError(
            f"{target} isn't written: read again, the model's predictions are off the run's by {off:.2g} of their "
            f"spread, and rounding explains {ROUNDING.get(model.dtype, COARSE):g}. That is a fault of fedtune's or of "
            "a library's: please report the base and the adapter's settings. The run itself is not concerned"
        )


def _state(run: Path) -> Path:
    return run / "checkpoint" / "state.safetensors"
