"""From the server to its clients: instructions, through the downlink's codec, and the same again at the other end.

    strategy.configure -> codec (the difference from what a client holds, where it is lossy) -> content of a message

What is evaluated and exported is what clients decode, so a broadcast is encoded before it is sent; it is encoded once,
and what it came to is kept until the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from flwr.app import RecordDict

from fedtune.core.errors import ClientError
from fedtune.core.protocol import Instruction, Setting, Tensors, is_lossless, same_tensors
from fedtune.core.seeds import derive_seed
from fedtune.lowrank.residual import base_version
from fedtune.planning.population import server_peer
from fedtune.wire.broadcast_chain import BroadcastChain, decode_broadcast, is_broadcast
from fedtune.wire.delta_coding import decode, encode, left_out
from fedtune.wire.flower_private import content_bytes
from fedtune.wire.messages import blob_of, check_finite, pack_told, unpack_instruction, unpack_settings
from fedtune.workspace.workspace import Workspace

NUMBER = "$number"  # in what a client keeps of a broadcast, beside the tensors


@dataclass(frozen=True)
class SentInstruction:
    """An instruction as it is sent, to one client or to many alike.

    Attributes:
        original: what the strategy meant.
        decoded: what the receiver makes of it.
        lost: what the codec left out: original less decoded; nothing of a lossless one.
        content_bytes: of the message, without its addresses.
    """

    content: RecordDict
    original: Instruction
    decoded: Instruction
    lost: Tensors
    payload_bytes: int
    content_bytes: int

    def for_the_answer(self, exact: bool) -> "SentInstruction":
        """What is needed when the client answers.

        Args:
            exact: both codecs are lossless, and nobody asks for more than settings.
        """
        decoded = Instruction({}, self.decoded.settings) if exact else self.decoded
        return replace(self, content=RecordDict(), decoded=decoded)


@dataclass(frozen=True)
class _Encoded:
    tensors: Tensors
    blob: bytes
    decoded: Tensors


class Downlink:
    """Both ends of what a server sends, in one workspace."""

    def __init__(self, workspace: Workspace):
        self._workspace = workspace
        self._key: int | None = None
        self._encoded: list[_Encoded] = []  # under this key
        self._newcomers: tuple[Any, int, Instruction] | None = None  # of which state and round

    @cached_property
    def start(self) -> Tensors:
        """What every model starts from: what a lossy broadcast is the difference from, the first at least."""
        return {} if self.is_lossless else self._workspace.model.layout.initial

    @property
    def is_lossless(self) -> bool:
        """Whether clients decode every bit of what was meant."""
        return is_lossless(self._workspace.codec_down)

    def key(self, number: int) -> int:
        """Of the codec's draws in round `number`."""
        return derive_seed(self._workspace.experiment.seed, "down", number)

    # The server's end

    def next_broadcast(self, sent: BroadcastChain, state: Any, number: int) -> BroadcastChain:
        """What will have been broadcast when round `number` begins."""
        if (instruction := self.chained(state, number)) is None:
            return sent
        return sent.follow(self._workspace.codec_down, instruction.tensors, self.key(number), self.start)

    def broadcast(self, sent: BroadcastChain, state: Any, number: int) -> Instruction:
        """What a fully capable client that holds nothing yet decodes in round `number`: what is evaluated and exported
        is what clients decode."""
        if (instruction := self.chained(state, number)) is not None:
            return self._after(sent, instruction)
        instruction = self._configure(state, number)
        if self.is_lossless:
            return instruction
        return Instruction(self._encode(instruction.tensors, self.key(number)).decoded, instruction.settings)

    def chained(self, state: Any, number: int) -> Instruction | None:
        """What round `number` tells as the difference from the broadcast before; None where it can't, because something
        in it has another shape than it starts with."""
        if not self._workspace.chained or self.is_lossless:
            return None
        instruction = self._configure(state, number)
        starts = {
            name: (self.start[name], tensor) for name, tensor in instruction.tensors.items() if name in self.start
        }
        alike = all(start.shape == tensor.shape and start.dtype == tensor.dtype for start, tensor in starts.values())
        return instruction if alike else None

    def encode(
        self, instruction: Instruction, number: int, run: str, sent: BroadcastChain | None = None, since: int = 0
    ) -> SentInstruction:
        """An instruction of round `number` as it is sent.

        Args:
            run: the run's id.
            sent: what was broadcast, if this instruction is the last of it.
            since: the number of the broadcast that the receiver holds.
        """
        if sent is not None:
            blob, decoded = sent.blob(since, self._beside(instruction)), self._after(sent, instruction)
        else:
            encoded = self._encode(instruction.tensors, self.key(number))
            blob, decoded = encoded.blob, Instruction(encoded.decoded, instruction.settings)
        content = pack_told(blob, instruction.settings, run)
        lost = {} if self.is_lossless else left_out(instruction.tensors, decoded.tensors)
        return SentInstruction(content, instruction, decoded, lost, len(blob), content_bytes(content))

    def release(self) -> None:
        """Let go of blobs that are on their way.

        A lossy broadcast for all is kept, which is small: it may be sent again in this round. What was made for one
        client each, or holds every bit, would take as much memory as all of them.
        """
        if self.is_lossless or len(self._encoded) > 1:
            self._encoded.clear()

    def forget(self) -> None:
        """Let go of what was encoded: the state that it was made of has gone."""
        self._encoded.clear()
        self._newcomers = None

    def _encode(self, tensors: Tensors, key: int) -> _Encoded:
        if key != self._key:
            self._key, self._encoded = key, []
        for known in self._encoded:
            if same_tensors(known.tensors, tensors):
                return known
        codec = self._workspace.codec_down
        blob = encode(codec, tensors, key, self.start)
        made = _Encoded(tensors, blob, tensors if self.is_lossless else decode(codec, blob, self.start))
        self._encoded.append(made)
        return made

    def _configure(self, state: Any, number: int) -> Instruction:
        """What the server would send in round `number` to a fully capable client that holds nothing yet."""
        known = self._newcomers
        if known is None or known[0] is not state or known[1] != number:
            workspace = self._workspace
            peer = server_peer(workspace.experiment, workspace.model.layout)
            self._newcomers = known = (state, number, workspace.strategy.configure(state, number, peer))
        return known[2]

    def _after(self, sent: BroadcastChain, instruction: Instruction) -> Instruction:
        return Instruction({**sent.told, **self._beside(instruction)}, instruction.settings)

    def _beside(self, instruction: Instruction) -> Tensors:
        """What nobody knows the start of, and goes whole."""
        return {name: tensor for name, tensor in instruction.tensors.items() if name not in self.start}

    # A client's end

    def decode(self, content: RecordDict, index: int, before: int, round: int | None = None) -> tuple[Instruction, str]:
        """The instruction in a message to client `index`, and the run's id.

        Args:
            before: the round before which it kept what the message builds on.
            round: under which it is to keep what it decodes, for the next; None: it isn't to.

        Raises:
            WireError: if the message has another form, or on a device of its own isn't finite.
            ClientError: if it builds on what this client doesn't hold.
        """
        blob = blob_of(content)
        if not is_broadcast(blob) or self.is_lossless:
            instruction, run = unpack_instruction(content, self._workspace.codec_down, self.start)
        else:
            settings, run = unpack_settings(content)
            instruction = self._from_chain(blob, settings, run, index, before, round)
        if self._workspace.owner is not None:
            check_finite(instruction.tensors)
        return instruction, run

    def held(self, run: str, index: int, round: int) -> tuple[int, int, bool]:
        """Before `round`, which version of the base (fedtune/lowrank/residual.py) client `index` holds, and which
        broadcast; and whether it has lost what it kept."""
        try:
            version, lost = base_version(self._workspace.client_states.load(run, index, round)), False
        except ClientError:
            version, lost = 0, True
        return version, self._recall(run, index, round)[0], lost

    def _from_chain(
        self, blob: bytes, settings: Mapping[str, Setting], run: str, index: int, before: int, round: int | None
    ) -> Instruction:
        heard = decode_broadcast(blob, self._workspace.codec_down, self.start, lambda: self._recall(run, index, before))
        if round is not None:
            kept = {**heard.held, NUMBER: torch.tensor(heard.number)}
            self._workspace.broadcasts.save(run, index, round, kept, alike=str(heard.number))
        return Instruction(heard.told, settings)

    def _recall(self, run: str, index: int, round: int) -> tuple[int, Tensors]:
        try:
            kept = self._workspace.broadcasts.load(run, index, round)
        except ClientError:  # the server can send the whole
            kept = {}
        number = kept.pop(NUMBER, None)
        return 0 if number is None else int(number), kept
