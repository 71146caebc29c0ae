"""From a client to the server: updates, through the uplink's codec, and all that is checked before one is believed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Codec, Instruction, Tensors, Update, grid, is_lossless
from fedtune.core.seeds import derive_seed
from fedtune.training.apply_instruction import SCALING, check_scaling
from fedtune.wire.delta_coding import decode, encode, left_out, with_feedback
from fedtune.wire.messages import blob_of, pack_update, unpack_update, update_bytes
from fedtune.workspace.workspace import Workspace


@dataclass(frozen=True)
class ReceivedUpdate:
    """A valid update, as it came.

    Attributes:
        known: what its blob is the difference from.
        content_bytes: of the message, without its addresses.
    """

    update: Update
    blob: bytes
    known: Tensors
    content_bytes: int


class Uplink:
    """Both ends of what a client answers, in one workspace."""

    def __init__(self, workspace: Workspace):
        self._workspace = workspace

    def known(self, decoded: Instruction) -> Tensors:
        """What a lossy answer is the difference from: what the client was sent, else what every model starts from."""
        if is_lossless(self._workspace.codec_up):
            return decoded.tensors
        return {**self._workspace.model.layout.initial, **decoded.tensors}

    # A client's end

    def encode(
        self, update: Update, run: str, index: int, round: int, decoded: Instruction, before: Tensors
    ) -> RecordDict:
        """Client `index`'s answer as it is sent; what codecs leave out of it is added to the next (codec_up.feedback).

        Args:
            decoded: what it was told.
            before: what it kept before it trained, where the codec is chosen by held-out loss.
        """
        workspace = self._workspace
        key, known = derive_seed(workspace.experiment.seed, "up", round, index), self.known(decoded)
        waiting = workspace.residuals.load(run, index, round) if workspace.feedback else {}
        update = replace(update, tensors=with_feedback(update.tensors, waiting))
        codec = self._best(index, decoded, update, before, key)
        content = pack_update(update, codec, key, known)
        if workspace.feedback:
            sent = decode(codec, blob_of(content), known)
            meant = {name: tensor for name, tensor in update.tensors.items() if name in known}  # others went whole
            # What was left out of tensors that are no part of this answer waits for one that they are part of
            workspace.residuals.save(run, index, round, waiting | left_out(meant, sent))
        return content

    def _best(self, index: int, told: Instruction, update: Update, memory: Tensors, key: int) -> Codec:
        """The uplink codec; of a grid, the one under which what is sent of `update` has the lowest loss on the client's
        own held-out data. Of equals, and without such data, the first.

        Args:
            memory: what the client held before it trained.
        """
        workspace = self._workspace
        tried = grid(workspace.codec_up)
        own = workspace.data.heldout[index]
        if not tried or not len(own):
            return tried[0] if tried else workspace.codec_up
        losses = []
        for codec in tried:
            sent = decode(codec, encode(codec, update.tensors, key, self.known(told)), self.known(told))
            model = workspace.install(Instruction({**told.tensors, **sent}, told.settings), dict(memory))
            loss = workspace.score(own, model).loss
            losses.append(loss if math.isfinite(loss) else math.inf)
        return tried[losses.index(min(losses))]

    # The server's end

    def decode(
        self,
        content: RecordDict,
        blob: bytes,
        peer: ClientInfo,
        decoded: Instruction,
        validate: Callable[[Update], None],
        knows_samples: bool,
    ) -> ReceivedUpdate:
        """What a client answered, decoded and checked: nobody else looks at an update before this has.

        Args:
            blob: the content's `blob_of`.
            decoded: what it was told, as far as its answer needs it.
            validate: the strategy's own check.
            knows_samples: whether `peer.samples` is what the server knows, rather than what the client said.

        Raises:
            FedtuneError: if it isn't what was asked for.
        """
        known = self.known(decoded)
        update = unpack_update(content, blob, self._workspace.codec_up, known)
        check_examples(update, peer, knows_samples)
        check_scaling(update, float(decoded.settings.get(SCALING, self._workspace.model.layout.scaling)))
        validate(update)
        return ReceivedUpdate(update, blob, known, update_bytes(blob, update))


def check_examples(update: Update, peer: ClientInfo, known: bool) -> None:
    """Check that a client claims as many examples as it has.

    Args:
        known: whether `peer.samples` is what the server knows, rather than what the client said.

    Raises:
        WireError: if it claims another number.
    """
    if known and update.examples != peer.samples:
        raise WireError(
            f"it claims {update.examples} examples, and the division of the data gives it {peer.samples}: expected as "
            "many, which are its `batches.examples`"
        )
    if update.examples > peer.samples:
        raise WireError(f"it claims {update.examples} examples; at the handshake it had {peer.samples}")
