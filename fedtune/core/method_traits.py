"""What a method says of itself: to the engine, and to those who print its name.

A strategy's class declares it in one expression of plain values, `traits: ClassVar[Traits] = Traits(...)`, which
`fedtune.config.targets.declared_traits` reads from the file without importing it. Nothing here imports torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a method is, what it can do and what it needs. What doesn't fit is refused before a model is loaded."""

    title: str = ""  # the method's name as a paper prints it; "" takes the class's
    control: bool = False  # comes from no paper: what others are compared with, as all data in one place
    mixed_ranks: bool = False  # takes a rank per client
    needs_low_rank: bool = False  # its algebra is that of s B A
    averages: bool = False  # state.adapter is an average of what clients sent: a server optimizer may step towards it
    lossy_up: bool = True  # works on what is nearly an update, and what is sent has a start that the server knows
    lossy_down: bool = True  # the same of what clients are sent
    plans: bool = False  # gives each client what its device can do; `configure` may raise CapacityError
    partial: bool = False  # clients train some of the layers each, and a layer is averaged over those who did
    personal: bool = False  # part of the model stays with its client, which is where it has to be evaluated
    asynchronous: bool = False  # takes updates as they come, the strategy's `buffer` of them at a time
    # Which of the strategy's settings, by dotted name, is what is else looked up elsewhere; "" for none
    population_size: str = ""  # how many clients there are in all: 1 where they are pooled into one
    local_steps: str = ""  # the steps that a client takes in a round; else the client's own `steps`
    learning_rate: str = ""  # the clients' learning rate; else the client's own `lr`
