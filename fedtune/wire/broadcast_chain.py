"""Lossy broadcasts that make up for one another: each is the difference from what the ones before came to.

What one left out is so in the next (EF21-P: Gruntkowska, Tyurin and Richtarik 2022, arXiv:2209.15218):

    x+ = x + mean(y_k - w)        w+ = w + C(x+ - w)        x the server's, w what clients hold, y_k what they send back

The server has y_k + (x - w) in y_k's place (`Replies.add`), so that whatever a strategy makes of its clients' tensors
is made of x. Broadcasts are counted; a client keeps what it decoded and is sent the links that it lacks, or the whole
where that is no longer.

    blob    "fl", version 1, form (one byte: 0 links, 1 the whole), the broadcast's number (varint), and
            links: the number of the one that they build on (varint; 0 is what every model starts from), and each with
            its length before it (varint), as fedtune/wire/delta_coding.py makes it
            the whole: a byte for each known tensor by name (1 if it is part of the last broadcast, else 0), and all of
            them as codec=packed has them, with the length before it (varint)
            then what belongs to the instruction and nobody knows the start of, as codec=packed has it; or nothing
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedtune.codecs.bytes import Format, varint
from fedtune.codecs.packed import Packed
from fedtune.core.errors import ClientError, WireError
from fedtune.core.protocol import Codec, Tensors, expect_like, size_of
from fedtune.wire import delta_coding as coding

FORMAT = Format(b"fl")
LINKS, WHOLE = 0, 1
MAX_NUMBER = 1 << 31
PACKED = Packed()


@dataclass(frozen=True)
class BroadcastChain:
    """What a server has broadcast.

    Args:
        number: of the last broadcast; 0 if there was none.
        held: what whoever heard all of them holds, by name; nothing before the first.
        names: those that are part of the last.
        links: the last broadcasts, encoded, oldest first, uint8.
    """

    number: int = 0
    held: Tensors = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    links: list[torch.Tensor] = field(default_factory=list)

    def follow(self, codec: Codec, tensors: Tensors, key: int, start: Tensors) -> "BroadcastChain":
        """One broadcast more.

        Args:
            tensors: what is meant; those that `start` has not are no part of the chain.
            key: of the codec's draws.
            start: what every model starts from.
        """
        known = self.held or start
        link = coding.encode(codec, {name: tensors[name] for name in known if name in tensors}, key, known)
        heard = coding.decode(codec, link, known)
        held = {**known, **heard}
        links = [*self.links, torch.frombuffer(bytearray(link), dtype=torch.uint8)]
        while sum(map(len, links)) > size_of(held):  # who lacks more than these is better off with the whole
            links = links[1:]
        return BroadcastChain(self.number + 1, held, sorted(heard), links)

    @property
    def told(self) -> Tensors:
        """The last broadcast, as it is heard."""
        return {name: self.held[name] for name in self.names}

    def blob(self, since: int, rest: Tensors) -> bytes:
        """What brings a client up to date that holds broadcast `since`.

        Args:
            rest: what goes with it as it is.
        """
        behind = self.number - since
        head = FORMAT.head
        tail = PACKED.encode(rest, 0) if rest else b""
        if 0 < behind <= len(self.links):
            links = [link.numpy().tobytes() for link in self.links[-behind:]]
            body = b"".join(varint(len(link)) + link for link in links)
            return head + bytes([LINKS]) + varint(self.number) + varint(since) + body + tail
        parts = bytes(name in self.names for name in sorted(self.held))
        whole = PACKED.encode(self.held, 0)
        return head + bytes([WHOLE]) + varint(self.number) + parts + varint(len(whole)) + whole + tail


@dataclass(frozen=True)
class DecodedBroadcast:
    """What a client makes of a broadcast."""

    number: int
    held: Tensors  # to be kept for the next
    told: Tensors  # the instruction's tensors


def is_broadcast(blob: bytes) -> bool:
    """Whether a blob says that it is part of a chain."""
    return FORMAT.claims(blob)


def decode_broadcast(
    blob: bytes, codec: Codec, start: Tensors, recall: Callable[[], tuple[int, Tensors]]
) -> DecodedBroadcast:
    """Read a broadcast, building on what this client holds.

    Args:
        start: what every model starts from.
        recall: the number of the broadcast that this client keeps, and its `held`.

    Raises:
        WireError: on anything that `Sent.blob` can't have made.
        ClientError: if the links build on what this client doesn't hold.
    """
    reader = FORMAT.reader(blob, "a broadcast")
    form = reader.take(1, "its form")[0]
    number = reader.varint("its number")
    if form > WHOLE or not 0 < number < MAX_NUMBER:
        raise WireError(f"broadcast {number} of form {form}: expected one from 1 up, of form {LINKS} or {WHOLE}")
    if form == WHOLE:
        parts = reader.take(len(start), "which tensors are part of it")
        if max(parts, default=0) > 1:
            raise WireError(f"expected 0 or 1 for each tensor, got {max(parts)}")
        held = PACKED.decode(reader.take(reader.varint("the length of the whole"), "the whole"))
        expect_like(held, start)
        told = {name: held[name] for name, there in zip(sorted(start), parts, strict=True) if there}
    else:
        since = reader.varint("the number of what it builds on")
        if since >= number:
            raise WireError(f"broadcast {number} can't build on number {since}")
        mine, held = recall() if since else (0, start)
        if mine != since:
            raise ClientError(f"the server's broadcast builds on number {since}; this client holds number {mine}")
        told = {}
        for _ in range(number - since):
            link = reader.take(reader.varint("the length of a link"), "a link")
            told = coding.decode(codec, link, held)
            if extra := told.keys() - held.keys():
                raise WireError(f"tensor '{min(extra)}' of a link is not known")
            expect_like(told, {name: held[name] for name in told})
            held = {**held, **told}
    rest = PACKED.decode(reader.rest()) if reader.left else {}
    if both := rest.keys() & held.keys():
        raise WireError(f"tensor '{min(both)}' comes twice")
    return DecodedBroadcast(number, held, {**told, **rest})
