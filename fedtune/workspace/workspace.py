"""The workspace: the method, the model and the data of an experiment, as one process of either side holds them.

What goes over the wire is made and read by fedtune/workspace/downlink.py and uplink.py, what a client does with a
message is fedtune/workspace/client_handler.py's; both work with this.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from fedtune.config.compatibility import check_codecs, check_training, check_traits, traits_of
from fedtune.config.compose import build, from_run_config
from fedtune.config.schema import FULL, DataSpec, Experiment, ModelSpec
from fedtune.core.costs import Costs, Weight
from fedtune.core.errors import DataError, ModelError
from fedtune.core.protocol import Client, Instruction, Layout, Score, Strategy, Tensors, is_lossless
from fedtune.core.seeds import derive_seed, permutation
from fedtune.data.federated_data import FederatedData, load_data
from fedtune.data.own_data import load_own
from fedtune.device.home import home
from fedtune.device.owner import Owner, check_room
from fedtune.evaluation.scoring import evaluate_all, score
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import Base, pick_device
from fedtune.models.given_adapter import with_given_adapter
from fedtune.models.model_checks import check_tokens, positions_for
from fedtune.models.shared_base import base_for
from fedtune.planning.cost_probe import base_bytes, costs_of, weights_of
from fedtune.training.apply_instruction import BITS
from fedtune.training.client_state import ClientStateStore
from fedtune.training.optimizers import IN_8_BITS, check_optimizer
from fedtune.wire.delta_coding import build_codec
from fedtune.workspace.cohort_size import asks_for_gradients, check_cohort, cohort_note, cohort_size

QUANTIZATION = {4: "nf4", 8: "int8"}  # by the bits that a client is told; as it is otherwise


class Workspace:
    """The method, the codecs, the model and the data of an experiment. Model and data are loaded on first use.

    Args:
        owner: whose machine this is, where the experiment is another's; None: it is this user's own.
    """

    def __init__(self, experiment: Experiment, owner: Owner | None = None):
        if owner is not None:
            owner.check(experiment)
        experiment = with_given_adapter(experiment)
        self.experiment, self.owner = experiment, owner
        allowed = None if owner is None else owner.targets
        self._beside: dict[int, LocalModel] = {}  # by bits, beside `model`
        self.strategy: Strategy[Any] = build(experiment.strategy, "method.strategy", allowed)
        self.client: Client[LocalModel] = build(experiment.method.client, "method.client", allowed)
        check_traits(experiment, traits_of(self.strategy))
        check_training(experiment, traits_of(self.strategy), self.client)
        check_cohort(experiment, self.client)
        self.codec_up, self.feedback = build_codec(experiment.codec_up, "codec_up", feedback=False, allowed=allowed)
        # Whether a broadcast is the difference from the one before
        self.codec_down, self.chained = build_codec(experiment.codec_down, "codec_down", feedback=True, allowed=allowed)
        check_codecs(experiment, traits_of(self.strategy), self.codec_up, self.codec_down)

    def use_threads(self) -> None:
        """Have torch take as many threads as the run's settings say. A device with fewer cores than the server is not
        made to run more than it has."""
        torch.set_num_threads(min(self.experiment.runtime.threads, os.cpu_count() or 1))

    @cached_property
    def model(self) -> LocalModel:
        return self._load(self.experiment.model)

    def model_for(self, instruction: Instruction) -> LocalModel:
        """The model on a base in the bits that the instruction asks for. Each is loaded once a process.

        Raises:
            ModelError: if this base can't be held in so many bits, or not on this machine.
        """
        asked = int(instruction.settings[BITS]) if BITS in instruction.settings else self.bits
        if asked == self.bits:
            return self.model
        if str(asked) not in (known := base_bytes(self.model)):
            raise ModelError(f"this base can't be held in {asked} bits; it can in {', '.join(known)}")
        if asked not in self._beside:
            spec = replace(self.experiment.model, quantization=QUANTIZATION.get(asked, "none"))
            self._beside[asked] = self._load(spec)
        return self._beside[asked]

    @cached_property
    def bits(self) -> int:
        """That the run's own base is held in: it is what is evaluated and exported."""
        asked = {name: bits for bits, name in QUANTIZATION.items()}.get(self.experiment.model.quantization)
        return asked or max(int(bits) for bits in base_bytes(self.model))

    @cached_property
    def layout(self) -> Layout:
        """What is trained; with what that costs, for methods that plan by it."""
        layout = self.model.layout
        if not traits_of(self.strategy).plans:
            return layout
        return replace(layout, costs=self.costs, weights=self.weights)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The layers that have a LoRA adapter."""
        return tuple(weights_of(self.model))

    @cached_property
    def weight_of(self) -> dict[str, Weight]:
        """The same by name."""
        return {weight.module: weight for weight in self.weights}

    @cached_property
    def costs(self) -> Costs:
        """What training this model on these data takes."""
        longest, train = self.data_spec.max_length, self.experiment.train
        return costs_of(self.model, self.data, train.at_once, self.experiment.seed, longest)

    def _load(self, spec: ModelSpec) -> LocalModel:
        changes = self.experiment.adapter.kind == FULL or self.experiment.model.merge == "requantize"
        runtime, own = self.experiment.runtime, spec if self.owner is None else self.owner.model(spec)
        device = pick_device(runtime.device, runtime.deterministic)
        if self._trains_here and (optimizer := getattr(self.client, "optimizer", "")) in IN_8_BITS:
            check_optimizer(optimizer, device)
        base = base_for(own, device, changes)
        if self.owner is not None:
            self.owner.check_base(spec, base.origin.sha256)
        return self._on(base)

    @property
    def _trains_here(self) -> bool:
        """Whether clients train on this very machine, as far as that can be told before one does."""
        on_device = self.owner is not None and self.owner.is_device
        return on_device or (self.owner is None and self.experiment.runtime.name == "local")

    def take(self, base: Base) -> None:
        """Have the model on this base, which was loaded already."""
        self.model = self._on(base)

    def _on(self, base: Base) -> LocalModel:
        experiment = self.experiment
        if self.owner is not None and self.owner.is_device:
            check_room(base.model, experiment.adapter)
        model = LocalModel(base, experiment.adapter, experiment.seed, experiment.model.merge == "requantize")
        if experiment.train.checkpoint_activations:
            model.checkpoint_activations()
        return model

    @cached_property
    def data_spec(self) -> DataSpec:
        """The data's settings, with examples no longer than the model has positions for."""
        room = positions_for(self.model.base, self.experiment.adapter)
        spec = self.experiment.data if self.owner is None else self.owner.data(self.experiment.data)
        return spec if room is None else replace(spec, max_length=min(spec.max_length, room))

    @property
    def notes(self) -> list[str]:
        """What is to be said of model and data when a run starts."""
        asked, taken = self.experiment.data.max_length, self.data_spec.max_length
        cut = f"data.max_length={asked} is more than the model has positions for: examples are cut to {taken} tokens"
        alone = cohort_note(self)
        return [*self.model.notes, *([cut] if taken < asked else []), *([alone] if alone else [])]

    @cached_property
    def data(self) -> FederatedData:
        population = self.experiment.population
        clients = population.pooled or population.clients
        spec, tokenizer, seed = self.data_spec, self.model.tokenizer, self.experiment.seed
        own = None if self.owner is None else self.owner.own_data
        loaded = load_own(spec, clients, tokenizer, seed, own) if own else load_data(spec, clients, tokenizer, seed)
        check_tokens(loaded.corpus, self.model.base)
        data = replace(loaded, pad=self.model.pad)
        return data.pooled() if population.pooled else data

    @cached_property
    def client_states(self) -> ClientStateStore:
        """What this process's clients keep: in the run folder, or on a device of its own in that device's home."""
        return self._store("clients")

    @cached_property
    def residuals(self) -> ClientStateStore:
        """What their messages left out so far (codec_up.feedback), in the same way."""
        return self._store("residuals")

    @cached_property
    def broadcasts(self) -> ClientStateStore:
        """What they decoded of the last broadcast, where broadcasts build on one another."""
        return self._store("broadcasts")

    def _store(self, name: str) -> ClientStateStore:
        out = self.experiment.out
        # Nobody else says where a device writes
        if self.owner is not None or self.experiment.runtime.name == "flower" or out is None:
            return ClientStateStore(home() / name)
        return ClientStateStore(Path(out).expanduser() / name, Path(out).expanduser())

    def samples(self, index: int) -> int:
        """Training examples of client `index`.

        Raises:
            DataError: if there is no such client.
        """
        if not 0 <= index < len(self.data.train):
            raise DataError(f"there is no client {index}: the data is divided among {len(self.data.train)}")
        return len(self.data.train[index])

    @cached_property
    def start(self) -> Tensors:
        """What every model starts from: what a lossy broadcast is the difference from, the first at least."""
        return {} if is_lossless(self.codec_down) else self.model.layout.initial

    def stacks(self, instruction: Instruction) -> bool:
        """Whether a client that hears this can be trained in one pass with others."""
        return asks_for_gradients(self.client) and not self.model_for(instruction).obstacle

    @cached_property
    def cohort(self) -> int:
        """How many clients of a round are trained in one pass over the base."""
        return cohort_size(self)

    def install(self, instruction: Instruction, memory: Tensors, beside: bool = False) -> LocalModel:
        """Make the model, which is returned, what a client with this memory would hold after hearing `instruction`.

        Args:
            beside: return a twin of it, to be trained beside others.
        """
        model = self.model_for(instruction)
        if beside:
            model = model.twin()
        else:
            model.reset()
            _ = model.obstacle  # tried once a process, before anything that came over the wire is in the model
        self.client.receive(model, instruction, memory)
        return model

    def evaluate(self) -> Score | None:
        """Score the model as it stands on data that no client holds; None if there is none (data.heldout=0)."""
        rows = self.data.server
        if not len(rows):
            return None
        if (limit := self.experiment.evaluate.examples) and limit < len(rows):
            rows = rows[permutation(derive_seed(self.experiment.seed, "evaluate"), len(rows))[:limit]]
        return self.evaluate_all(rows, self.model)

    def evaluate_on(self, index: int) -> Score | None:
        """Score the model as it stands on client `index`'s held-out data; None if it has none."""
        own = self.data.heldout[index]
        return self.evaluate_all(own, self.model) if len(own) else None

    def score(self, rows: Any, model: LocalModel) -> Score:
        """The loss and accuracy of a model on these rows, and nothing that takes generating."""
        return score(model, self.data.corpus, rows, self.experiment.evaluate.batch_size, self.data.pad)

    def evaluate_all(self, rows: Any, model: LocalModel) -> Score:
        """All that `evaluate.` asks for of a model on these rows."""
        spec, key = self.experiment.evaluate, derive_seed(self.experiment.seed, "generate")
        return evaluate_all(model, self.data.corpus, rows, spec, self.data.pad, key)


def workspace_of(run_config: Mapping[str, Any], owner: Owner | None = None) -> Workspace:
    """The workspace of the run that this config describes, on `owner`'s machine; one a process, however many ask."""
    text = run_config.get("config") or from_run_config(run_config).text()
    return _workspace(str(text), owner)


@lru_cache(maxsize=1)
def _workspace(text: str, owner: Owner | None) -> Workspace:
    workspace = Workspace(from_run_config({"config": text}), owner)
    workspace.use_threads()
    return workspace
