"""A client that misbehaves when told to, for tests against real processes.

MISCHIEF="how:seed:round:index ..." in the environment of the process that trains; how is one of `raise`, `die`
(SIGKILL), `hang`, `wait` (until the folder MISCHIEF_DONE has a file `go-ROUND`) and `nan`; with `-once` it is so at the
first try only (a file in that folder remembers). But for `wait` the client keeps nothing of such a turn, so a run
in which the same turns just raise has the same result.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from remembering import Remembering

from fedtune.core.protocol import Update
from fedtune.core.seeds import derive_seed

WORDS = ("method.client._target_=mischief.Mischief",)


@dataclass(frozen=True)
class Mischief(Remembering):
    def train(self, model, batches, instruction, memory, key):
        told = [word.split(":") for word in os.environ.get("MISCHIEF", "").split()]
        plan = ((how, at[1]) for how, *at in told if key == derive_seed(int(at[0]), "train", int(at[1]), int(at[2])))
        how, round = next(plan, (None, ""))
        if how and how.endswith("-once"):
            done = Path(os.environ["MISCHIEF_DONE"], how)
            how = None if done.exists() else how.removesuffix("-once")
            done.touch()
        if how == "raise":
            raise ConnectionError("the battery is flat")
        if how == "nan":
            broken = {name: tensor * torch.nan for name, tensor in instruction.tensors.items()}
            return Update(broken, batches.examples)
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "hang" or (how == "wait" and not Path(os.environ["MISCHIEF_DONE"], f"go-{round}").exists()):
            time.sleep(0.1)
        return super().train(model, batches, instruction, memory, key)
