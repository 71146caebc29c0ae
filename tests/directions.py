"""Directions of seeded noise by themselves. fedtune only ever adds them up, in the kernels that make them."""

import math

from fedtune.random_directions.hash_noise import SIGMA, Table, accumulate_, render_

KURTOSIS = {"normal": 2.875, "rademacher": 1.0}


def values(seed, name, shape, kind="normal"):
    """The direction of that seed and parameter, float32."""
    table = Table({name: math.prod(shape)})
    sums = table.sums()
    accumulate_(table, sums, [seed], [1], kind)
    return table.total(sums, name).reshape(tuple(shape)).float() / SIGMA[kind]


def moved(weight, seed, name, c, kind="normal"):
    """weight + c z, in the weight's type; c is taken to 20 bits."""
    table = Table({name: weight.numel()})
    start, out = table.zeros(weight.dtype), table.zeros(weight.dtype)
    table.part(start, name).copy_(weight.flatten())
    render_(table, out, start, table.sums(), 1.0, seed, c, kind)
    return table.part(out, name).reshape(weight.shape).clone()
