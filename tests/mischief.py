"""A client that misbehaves when told to, for tests against real processes.

MISCHIEF="how:round:index ..." in the environment of the process that trains; how is one of `raise`, `die` (SIGKILL),
`die-once` (a file in MISCHIEF_DONE remembers), `hang`, `slow` (5 s) and `nan`.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from remembering import Remembering

from fedtune.keys import fold
from fedtune.protocol import Update

WORDS = ("method.client._target_=mischief.Mischief",)


@dataclass(frozen=True)
class Mischief(Remembering):
    def train(self, model, batches, instruction, memory, key):
        told = [word.split(":") for word in os.environ.get("MISCHIEF", "").split()]
        how = next((how for how, round, index in told if key == fold(0, "train", int(round), int(index))), None)
        if how == "raise":
            raise ConnectionError("the battery is flat")
        if how == "die-once":
            done = Path(os.environ["MISCHIEF_DONE"])
            how = None if done.exists() else "die"
            done.touch()
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("hang", "slow"):
            time.sleep(10_000 if how == "hang" else 5)
        update = super().train(model, batches, instruction, memory, key)
        if how == "nan":
            return Update({name: t * torch.nan for name, t in update.tensors.items()}, update.examples)
        return update
