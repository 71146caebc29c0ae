"""Every error a person can meet, by name.

A message names the thing, says what was expected and what came, and shows the way out. The command line prints the
message alone; a library user catches `FedtuneError` or one of its kinds.
"""


class FedtuneError(Exception):
    """The base of all errors that fedtune raises on purpose."""


class ConfigError(FedtuneError):
    """A setting is unknown, misspelled, of the wrong type or out of range."""


class DataError(FedtuneError):
    """A data source can't be read, or a row lacks what training needs."""


class ModelError(FedtuneError):
    """A base model can't be loaded, or the adapter doesn't fit it."""


class WireError(FedtuneError):
    """A message or blob isn't what was agreed on. Input from a peer is hostile until checked."""


class ClientError(FedtuneError):
    """A client could not do its part of a round."""


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
