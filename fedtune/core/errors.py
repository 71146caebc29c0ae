"""Every error a person can meet, by name.

A message names the thing, says what was expected and what came, and shows the way out. The command line prints the
message alone; a library user catches `FedtuneError` or one of its kinds.

What a peer says of itself, or names, ends up in errors, and those in tables, terminals and pages. So the two kinds that
quote peers hold nothing but a line of printable characters, however they are raised.
"""

MAX_TEXT = 500  # characters of an error that quotes a peer
MAX_NAME = 80  # characters of what it quotes, where its own words come after


def printable(text: str, most: int = MAX_TEXT) -> str:
    """A stranger's text as one line of at most `most` printable characters.

    What isn't printable (escape sequences, line ends, characters that turn the direction of writing) is a space where
    it is one, and else spelt out, as \\x1b.
    """
    looked = text[: 8 * most]  # at no more of what may be megabytes
    words = " ".join(looked.split())[: most + 1]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= most and looked == text else f"{line[: most - 4]} ..."


def short(name: object) -> str:
    """What a stranger calls something, cut to be quoted in an error."""
    return printable(str(name), MAX_NAME)


class FedtuneError(Exception):
    """The base of all errors that fedtune raises on purpose."""


class ConfigError(FedtuneError):
    """A setting is unknown, misspelled, of the wrong type or out of range."""


class DataError(FedtuneError):
    """A data source can't be read, or a row lacks what training needs."""


class ModelError(FedtuneError):
    """A base model can't be loaded, or the adapter doesn't fit it."""


class QuotedError(FedtuneError):
    """An error that may quote a peer, whose words are cut and made printable (`printable`)."""

    def __init__(self, text: object = ""):
        super().__init__(printable(str(text)))


class WireError(QuotedError):
    """A message or blob isn't what was agreed on. Input from a peer is hostile until checked."""


class ClientError(QuotedError):
    """A client could not do its part of a round."""


class ClientTimeout(ClientError):
    """A client was too slow, which is no fault of how it is set up."""


class QuorumError(FedtuneError):
    """Too few clients replied for the round to count."""


class CapacityError(FedtuneError):
    """A device can't do what is asked of it: too little memory, or too slow for the deadline."""


class DivergedError(FedtuneError):
    """The loss is no longer a finite number."""


class RunFolderError(FedtuneError):
    """A run folder can't be created, written, read or resumed."""


class ExportError(FedtuneError):
    """A run's model can't be made again, or can't be written as a model folder."""


class DeploymentError(FedtuneError):
    """A part of a deployment didn't come up, was refused, or went away."""


class Interrupted(FedtuneError):
    """Somebody pressed Ctrl-C, or the process was told to end."""


# What data of another form than expected makes Python and torch raise
MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # RecursionError among them
    TypeError,
    ValueError,
    MemoryError,
)
