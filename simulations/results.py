"""The comparison in docs/results.md: every method on SmolLM2, three seeds, each at its own learning rate.

    python -m simulations.results                    hours on a CPU; about a quarter of an hour on an H100 with 15 jobs
    python -m simulations.results jobs=15 runtime.device=cuda
    python -m simulations.results model=tiny rounds=4 budget.rounds=2 budget.bytes=1e6       in minutes, to try it

What is typed is added to the comparison's own words. What is finished isn't run again.
"""

import sys
from collections.abc import Sequence

from fedtune.commands.main import main as fedtune
from fedtune.config.compose import choices

# A step along a seeded direction costs two forward passes and moves one number: it takes more of them
FORWARD_ONLY = {
    "fedkseed": "method.strategy.rules.local_steps=32",
    "fedkseed_pro": "method.strategy.rules.local_steps=32",
    "mezo": "method.strategy.rules.local_steps=32",
}
LIMITED = ("fedasync", "fedbuff", "fedpipe")  # what they do is for unequal devices; among equal ones they are FedIT
CODECS = ("int8", "nf4", "compeft")  # of fedit, beside raw
WORDS = (
    "seeds=[0,1,2]",
    "tune.lr=[1x,3x,10x]",
    "tune.rounds=2",
    "experiment=results",
    "out=runs/results",
)


def words(given: Sequence[str]) -> list[str]:
    """What `fedtune compare` is told; a word that is given takes the place of the comparison's own."""
    items = [
        f'"{name}: {name} {FORWARD_ONLY[name]}"' if name in FORWARD_ONLY else name
        for name in choices("method")
        if name not in LIMITED
    ]
    items += [f'"fedit {codec}: fedit codec={codec}"' for codec in CODECS]
    keys = {word.partition("=")[0] for word in given}
    own = [word for word in (f"methods=[{','.join(items)}]", *WORDS) if word.partition("=")[0] not in keys]
    return [*own, *given]


if __name__ == "__main__":
    sys.exit(fedtune(["compare", *words(sys.argv[1:])]))
