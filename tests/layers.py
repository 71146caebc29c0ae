"""Small adapters for tests: two layers, neither square, in float64 unless told."""

import torch

from fedtune.core.protocol import ClientInfo, Layout, Slot, Update
from fedtune.lowrank.algebra import lora_factors, name_of

SHAPES = {"one": (5, 3), "two": (4, 7)}  # module: (out, in)
RANK, SCALING = 4, 2.0


def factors(rank, seed, shapes=SHAPES, dtype=torch.float64):
    """A and B of every layer, normal."""
    draw = torch.Generator().manual_seed(seed)
    adapter = {}
    for module, (out, width) in shapes.items():
        adapter[name_of(module, "lora_A")] = torch.randn(rank, width, dtype=torch.float64, generator=draw).to(dtype)
        adapter[name_of(module, "lora_B")] = torch.randn(out, rank, dtype=torch.float64, generator=draw).to(dtype)
    return adapter


def layout(rank=RANK, scaling=SCALING, shapes=SHAPES, dtype=torch.float64):
    """A normal, B zero."""
    start = factors(rank, 99, shapes, dtype)
    start = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in start.items()}
    slots = tuple(
        Slot(name, tuple(t.shape), str(dtype).split(".")[1], name.split(".")[1], name.split(".")[0], scaling)
        for name, t in start.items()
    )
    return Layout(slots, start)


def reply(index, rank=RANK, scaling=SCALING, examples=1, seed=None, roles=("lora_A", "lora_B"), **metrics):
    """A client of that rank that sends random factors."""
    tensors = factors(rank, index if seed is None else seed)
    sent = {name: t for name, t in tensors.items() if name.split(".")[1] in roles}
    return ClientInfo(index, examples, rank=rank, scaling=scaling), Update(sent, examples, metrics)


def dense(adapter, scaling=1.0):
    """scaling B A of each layer, as whole matrices."""
    return {module: scaling * p.b.double() @ p.a.double() for module, p in lora_factors(adapter).items()}


def ideal(replies, frozen=None):
    """sum_k p_k s_k B_k A_k of each layer. What a client didn't send is what it was sent: the first of `frozen`."""
    total = sum(update.examples for _, update in replies)
    found = {}
    for peer, update in replies:
        held = {name: t[: peer.rank] if "lora_A" in name else t[:, : peer.rank] for name, t in (frozen or {}).items()}
        held |= update.tensors
        for module, matrix in dense(held, peer.scaling * update.examples / total).items():
            found[module] = found.get(module, 0) + matrix
    return found


def distance(one, other):
    """||one - other||_F / ||other||_F over all layers."""
    apart = sum(float((one[m] - other[m]).square().sum()) for m in other)
    return (apart / sum(float(other[m].square().sum()) for m in other)) ** 0.5
