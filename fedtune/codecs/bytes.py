"""Blobs, byte by byte: how one begins, and a reader that takes it apart.

    blob      the format's magic, its version (one byte), and what the format says
    varint    seven bits a byte, lowest first; all but the last have the eighth bit set; least form only
    zigzag    0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ...: small either way

Varint and zigzag are those of Protocol Buffers (https://protobuf.dev/programming-guides/encoding).
"""

from typing import NamedTuple

from fedtune.core.errors import WireError


class Reader:
    """Takes a blob apart from `place` on; one that ends too early is a WireError that says within what."""

    def __init__(self, blob: bytes, place: int = 0):
        self.blob = blob
        self.place = place

    @property
    def left(self) -> int:
        """How many bytes are yet to be read."""
        return len(self.blob) - self.place

    def rest(self) -> bytes:
        """The bytes that are yet to be read, which stay so."""
        return self.blob[self.place :]

    def take(self, length: int, what: str) -> bytes:
        """The next bytes.

        Args:
            what: that they are, for the error.

        Raises:
            WireError: if there are fewer.
        """
        if length > self.left:
            raise WireError(f"it ends within {what}: {length} bytes expected, {self.left} left")
        self.place += length
        return self.blob[self.place - length : self.place]

    def varint(self, what: str) -> int:
        """The next whole number, of 64 bits at most.

        Raises:
            WireError: if there is none, or one that `varint` can't have made.
        """
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1, what)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    raise WireError(f"{what} is written with more bytes than it needs")
                if value >> 64:
                    break
                return value
        raise WireError(f"{what} has more than 64 bits")


class Format(NamedTuple):
    """How the blobs of one kind begin."""

    magic: bytes
    version: int = 1  # below 256

    @property
    def head(self) -> bytes:
        """The magic and the version."""
        return self.magic + bytes([self.version])

    def claims(self, blob: bytes) -> bool:
        """Whether it says that it is of this kind, of whatever version."""
        return blob.startswith(self.magic)

    def reader(self, blob: bytes, what: str = "") -> Reader:
        """A reader of what comes after the head.

        Args:
            what: it should be, as "a difference", where the caller doesn't say so itself.

        Raises:
            WireError: if it begins with another head.
        """
        wrong, place = "", len(self.magic)
        if not self.claims(blob):
            wrong = f"it should begin with {self.magic!r}, got {blob[:place]!r}"
        elif blob[place : place + 1] != bytes([self.version]):
            wrong = f"expected version {self.version}, got {blob[place] if len(blob) > place else 'none'}"
        if wrong:
            raise WireError(f"not {what} ({len(blob)} bytes): {wrong}" if what else wrong)
        return Reader(blob, place + 1)


def varint(value: int) -> bytes:
    """A whole number from 0 up, in as few bytes as a varint takes."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def zigzag(value: int) -> int:
    """A whole number of either sign as one from 0 up."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return -(value + 1 >> 1) if value & 1 else value >> 1
