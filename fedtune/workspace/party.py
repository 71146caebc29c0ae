"""A party: what one process of the server or of a client holds to take its part."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from fedtune.config.compatibility import check_codecs, check_traits, traits_of
from fedtune.config.compose import build, from_run_config
from fedtune.config.schema import FULL, DataSpec, Experiment, ModelSpec
from fedtune.core.costs import Costs, Weight
from fedtune.core.errors import ClientError, DataError, ModelError
from fedtune.core.protocol import Client, Codec, Instruction, Layout, Strategy, Tensors, Update, grid, is_lossless
from fedtune.core.seeds import derive_seed, permutation
from fedtune.data.federated_data import FederatedData, load_data
from fedtune.device.owner import Owner, check_room
from fedtune.evaluation.scoring import Score, evaluate_all, score
from fedtune.lowrank.residual import base_version
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import Base, pick_device
from fedtune.models.model_checks import check_tokens, positions_for
from fedtune.models.shared_base import base_for
from fedtune.planning.cost_probe import base_bytes, costs_of, weights_of
from fedtune.planning.population import server_peer
from fedtune.training.apply_instruction import BATCH, BITS, STEPS
from fedtune.training.client_state import ClientStateStore, home
from fedtune.wire.broadcast_chain import BroadcastChain, hear, is_link
from fedtune.wire.delta_coding import build_codec, decode, encode, left_out, with_feedback
from fedtune.wire.messages import (
    blob_of,
    check_finite,
    pack_instruction,
    pack_told,
    pack_update,
    unpack_instruction,
    unpack_settings,
)

QUANTIZATION = {4: "nf4", 8: "int8"}  # by the bits that a client is told; as it is otherwise
NUMBER = "$number"  # in what a client keeps of a broadcast, beside the tensors


class Party:
    """The method, the codecs, the model and the data of an experiment. Model and data are loaded on first use.

    Attributes:
        training_seconds: what the last turn's training took.

    Args:
        owner: whose machine this is, where the experiment is another's; None: it is this user's own.
    """

    def __init__(self, experiment: Experiment, owner: Owner | None = None):
        if owner is not None:
            owner.check(experiment)
        self.experiment, self.owner = experiment, owner
        allowed = None if owner is None else owner.targets
        self.training_seconds = 0.0
        self._beside: dict[int, LocalModel] = {}  # by bits, beside `model`
        self.strategy: Strategy[Any] = build(experiment.strategy, "method.strategy", allowed)
        self.client: Client = build(experiment.method.client, "method.client", allowed)
        check_traits(experiment, traits_of(self.strategy))
        self.codec_up, self.feedback = build_codec(experiment.codec_up, "codec_up", feedback=False, allowed=allowed)
        # Whether a broadcast is the difference from the one before
        self.codec_down, self.chained = build_codec(experiment.codec_down, "codec_down", feedback=True, allowed=allowed)
        check_codecs(experiment, traits_of(self.strategy), self.codec_up, self.codec_down)
        # A device with fewer cores than the server is not made to run more threads than it has
        torch.set_num_threads(min(experiment.runtime.threads, os.cpu_count() or 1))

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
    def costs(self) -> Costs:
        """What training this model on these data takes."""
        return costs_of(self.model, self.data, self.experiment.train.batch_size, self.experiment.seed)

    def _load(self, spec: ModelSpec) -> LocalModel:
        changes = self.experiment.adapter.kind == FULL or self.experiment.model.merge == "requantize"
        return self._on(base_for(spec, pick_device(self.experiment.runtime.device), changes))

    def take(self, base: Base) -> None:
        """Have the model on this base, which was loaded already."""
        self.model = self._on(base)

    def _on(self, base: Base) -> LocalModel:
        experiment = self.experiment
        if self.owner is not None and self.owner.is_device:
            check_room(base.model, experiment.adapter)
        return LocalModel(base, experiment.adapter, experiment.seed, experiment.model.merge == "requantize")

    @cached_property
    def data_spec(self) -> DataSpec:
        """The data's settings, with examples no longer than the model has positions for."""
        room = positions_for(self.model.base, self.experiment.adapter)
        spec = self.experiment.data
        return spec if room is None else replace(spec, max_length=min(spec.max_length, room))

    @property
    def notes(self) -> list[str]:
        """What is to be said of model and data when a run starts."""
        asked, taken = self.experiment.data.max_length, self.data_spec.max_length
        cut = f"data.max_length={asked} is more than the model has positions for: examples are cut to {taken} tokens"
        return [*self.model.notes, *([cut] if taken < asked else [])]

    @cached_property
    def data(self) -> FederatedData:
        population = self.experiment.population
        clients = population.pooled or population.clients
        loaded = load_data(self.data_spec, clients, self.model.tokenizer, self.experiment.seed)
        check_tokens(loaded.corpus, self.model.base)
        data = replace(loaded, pad=self.model.pad)
        return data.pooled() if population.pooled else data

    @cached_property
    def memory(self) -> ClientStateStore:
        """What this process's clients keep: in the run folder, or on a device of its own in that device's home."""
        return self._kept("clients")

    @cached_property
    def residuals(self) -> ClientStateStore:
        """What their messages left out so far (codec_up.feedback), in the same way."""
        return self._kept("residuals")

    def _kept(self, name: str) -> ClientStateStore:
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

    def holds(self, run: str, index: int, round: int) -> tuple[int, int, bool]:
        """Before `round`, which version of the base (fedtune/lowrank/residual.py) client `index` holds, and which broadcast; and
        whether it has lost what it kept."""
        try:
            version, lost = base_version(self.memory.load(run, index, round)), False
        except ClientError:
            version, lost = 0, True
        return version, self._recall(run, index, round)[0], lost

    @cached_property
    def start(self) -> Tensors:
        """What every model starts from: what a lossy broadcast is the difference from, the first at least."""
        return {} if is_lossless(self.codec_down) else self.model.layout.initial

    @cached_property
    def heard(self) -> ClientStateStore:
        """What this process's clients decoded of the last broadcast, where broadcasts build on one another."""
        return self._kept("broadcasts")

    def announce(self, sent: BroadcastChain, state: Any, number: int) -> BroadcastChain:
        """What will have been broadcast when round `number` begins."""
        if (instruction := self.announced(state, number)) is None:
            return sent
        return sent.follow(
            self.codec_down, instruction.tensors, derive_seed(self.experiment.seed, "down", number), self.start
        )

    def broadcast(self, sent: BroadcastChain, state: Any, number: int) -> Instruction:
        """What a fully capable client that holds nothing yet hears in round `number`, through the wire's codec: what is
        evaluated and exported is what clients decode."""
        if (instruction := self.announced(state, number)) is not None:
            return self._heard(sent, instruction)
        return self.tell(self._configure(state, number), derive_seed(self.experiment.seed, "down", number), "")[1]

    def announced(self, state: Any, number: int) -> Instruction | None:
        """What round `number` tells as the difference from the broadcast before; None where it can't, because something
        in it has another shape than it starts with."""
        if not self.chained or is_lossless(self.codec_down):
            return None
        instruction = self._configure(state, number)
        starts = {
            name: (self.start[name], tensor) for name, tensor in instruction.tensors.items() if name in self.start
        }
        alike = all(start.shape == tensor.shape and start.dtype == tensor.dtype for start, tensor in starts.values())
        return instruction if alike else None

    def _configure(self, state: Any, number: int) -> Instruction:
        """What the server would send in round `number` to a fully capable client that holds nothing yet."""
        return self.strategy.configure(state, number, server_peer(self.experiment, self.model.layout))

    def tell(
        self, instruction: Instruction, key: int, run: str, sent: BroadcastChain | None = None, since: int = 0
    ) -> tuple[RecordDict, Instruction]:
        """An instruction as it is sent, and as it is heard.

        Args:
            sent: what was broadcast, if this instruction is the last of it.
            since: the number of the broadcast that the receiver holds.
        """
        if sent is not None:
            blob = sent.blob(since, self._rest(instruction))
            return pack_told(blob, instruction.settings, run), self._heard(sent, instruction)
        content = pack_instruction(instruction, self.codec_down, key, run, self.start)
        if is_lossless(self.codec_down):
            return content, instruction
        return content, unpack_instruction(content, self.codec_down, self.start)[0]

    def hear(self, content: RecordDict, index: int, before: int, round: int | None = None) -> tuple[Instruction, str]:
        """The instruction in a message to client `index`, and the run's id.

        Args:
            before: the round before which it kept what the message builds on.
            round: under which it is to keep what it hears, for the next; None: it isn't to.
        """
        heard = self._decoded(content, index, before, round)
        if self.owner is not None:
            check_finite(heard[0].tensors)
        return heard

    def _decoded(self, content: RecordDict, index: int, before: int, round: int | None) -> tuple[Instruction, str]:
        blob = blob_of(content)
        if not is_link(blob) or is_lossless(self.codec_down):
            return unpack_instruction(content, self.codec_down, self.start)
        settings, run = unpack_settings(content)
        heard = hear(blob, self.codec_down, self.start, lambda: self._recall(run, index, before))
        if round is not None:
            kept = {**heard.held, NUMBER: torch.tensor(heard.number)}
            self.heard.keep(run, index, round, kept, alike=str(heard.number))
        return Instruction(heard.told, settings), run

    def _recall(self, run: str, index: int, round: int) -> tuple[int, Tensors]:
        try:
            kept = self.heard.recall(run, index, round)
        except ClientError:  # the server can send the whole
            kept = {}
        number = kept.pop(NUMBER, None)
        return 0 if number is None else int(number), kept

    def _heard(self, sent: BroadcastChain, instruction: Instruction) -> Instruction:
        return Instruction({**sent.told, **self._rest(instruction)}, instruction.settings)

    def _rest(self, instruction: Instruction) -> Tensors:
        return {name: tensor for name, tensor in instruction.tensors.items() if name not in self.start}

    def answer(self, run: str, index: int, round: int, instruction: Instruction) -> RecordDict:
        """Client `index` does its part of a round (`turn`); its answer as it is sent."""
        before = self.memory.load(run, index, round) if grid(self.codec_up) else {}
        update = self.turn(run, index, round, instruction)
        key, known = derive_seed(self.experiment.seed, "up", round, index), self.known(instruction)
        waiting = self.residuals.load(run, index, round) if self.feedback else {}
        update = replace(update, tensors=with_feedback(update.tensors, waiting))
        codec = self._best(index, instruction, update, before, key)
        content = pack_update(update, codec, key, known)
        if self.feedback:
            sent = decode(codec, blob_of(content), known)
            meant = {name: tensor for name, tensor in update.tensors.items() if name in known}  # others went whole
            # What was left out of tensors that are no part of this answer waits for one that they are part of
            self.residuals.save(run, index, round, waiting | left_out(meant, sent))
        return content

    def known(self, told: Instruction) -> Tensors:
        """What a lossy answer is the difference from: what the client was told, else what every model starts from."""
        return told.tensors if is_lossless(self.codec_up) else {**self.model.layout.initial, **told.tensors}

    def _best(self, index: int, told: Instruction, update: Update, memory: Tensors, key: int) -> Codec:
        """The uplink codec; of a grid, the one under which what is sent of `update` has the lowest loss on the client's
        own held-out data. Of equals, and without such data, the first.

        Args:
            memory: what the client held before its turn.
        """
        tried = grid(self.codec_up)
        own = self.data.heldout[index]
        if not tried or not len(own):
            return tried[0] if tried else self.codec_up
        losses = []
        for codec in tried:
            sent = decode(codec, encode(codec, update.tensors, key, self.known(told)), self.known(told))
            model = self.install(Instruction({**told.tensors, **sent}, told.settings), dict(memory))
            loss = self._score(own, model).loss
            losses.append(loss if math.isfinite(loss) else math.inf)
        return tried[losses.index(min(losses))]

    def turn(self, run: str, index: int, round: int, instruction: Instruction) -> Update:
        """Client `index` trains, on a model that holds nothing of the turn before.

        Args:
            run: the run's id, under which the client's memory is kept.
        """
        experiment = self.experiment
        key = derive_seed(experiment.seed, "train", round, index)
        memory = self.memory.load(run, index, round)
        model = self.install(instruction, memory)
        settings = instruction.settings
        batches = self.data.batches(index, int(settings.get(BATCH, experiment.train.batch_size)), key)
        own = self.data.heldout[index]
        found = self._score(own, model) if experiment.evaluate.clients and len(own) else None
        client: Any = self.client
        if STEPS in settings:
            client = replace(client, steps=int(settings[STEPS]))
        begun = time.perf_counter()
        update: Update = client.train(model, batches, instruction, memory, key)
        self.training_seconds = time.perf_counter() - begun
        if memory:
            self.memory.save(run, index, round, memory)
        if found is None:
            return update
        scores = {"client_eval_loss": found.loss, "client_eval_accuracy": found.accuracy}
        return replace(update, metrics={**update.metrics, **scores})

    def examine(self, run: str, index: int, round: int, instruction: Instruction) -> Score | None:
        """Score what client `index` holds after `round` on its own held-out data; None if it has none."""
        own = self.data.heldout[index]
        if not len(own):
            return None
        return self._appraise(own, self.install(instruction, self.memory.load(run, index, round + 1)))

    def install(self, instruction: Instruction, memory: Tensors) -> LocalModel:
        """Make the model, which is returned, what a client with this memory would hold after hearing `instruction`."""
        model = self.model_for(instruction)
        model.reset()
        self.client.receive(model, instruction, memory)
        return model

    def evaluate(self) -> Score | None:
        """Score the model as it stands on data that no client holds; None if there is none (data.heldout=0)."""
        rows = self.data.server
        if not len(rows):
            return None
        if (limit := self.experiment.evaluate.examples) and limit < len(rows):
            rows = rows[permutation(derive_seed(self.experiment.seed, "evaluate"), len(rows))[:limit]]
        return self._appraise(rows, self.model)

    def evaluate_on(self, index: int) -> Score | None:
        """Score the model as it stands on client `index`'s held-out data; None if it has none."""
        own = self.data.heldout[index]
        return self._appraise(own, self.model) if len(own) else None

    def _appraise(self, rows: Any, model: LocalModel) -> Score:
        spec, key = self.experiment.evaluate, derive_seed(self.experiment.seed, "generate")
        return evaluate_all(model, self.data.corpus, rows, spec, self.data.pad, key)

    def _score(self, rows: Any, model: LocalModel) -> Score:
        return score(model, self.data.corpus, rows, self.experiment.evaluate.batch_size, self.data.pad)


def party_of(run_config: Mapping[str, Any], owner: Owner | None = None) -> Party:
    """The party of the run that this config describes, on `owner`'s machine; one a process, however many ask."""
    text = run_config.get("config") or from_run_config(run_config).text()
    return _party(str(text), owner)


@lru_cache(maxsize=1)
def _party(text: str, owner: Owner | None) -> Party:
    return Party(from_run_config({"config": text}), owner)
