"""Low-rank algebra: matrices kept as B A, so that nothing of the size of a weight is formed.

Everything is computed in float64. A product, never a factor, is what has a meaning: B A = (B M)(M^-1 A) for any M.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.protocol import Tensors

FOLD = 512  # columns up to which a sum stays in factors even where the matrix itself would be smaller


@dataclass(frozen=True)
class LowRank:
    """The matrix B A."""

    b: Tensor  # (m, r)
    a: Tensor  # (r, n)

    @property
    def rank(self) -> int:
        """The inner width r, an upper bound of the rank."""
        return self.a.shape[0]


def name_of(module: str, role: str) -> str:
    """The name of a LoRA factor, as in `...q_proj.lora_A.weight`."""
    return f"{module}.{role}.weight"


def pairs(adapter: Tensors) -> dict[str, LowRank]:
    """B and A of each layer, told apart by name, by the module that they adapt."""
    ending = name_of("", "lora_A")
    modules = [name.removesuffix(ending) for name in adapter if name.endswith(ending)]
    return {m: LowRank(adapter[name_of(m, "lora_B")], adapter[name_of(m, "lora_A")]) for m in modules}


def unpair(products: Mapping[str, LowRank], dtype: torch.dtype | None = None) -> Tensors:
    """The inverse of `pairs`, with the tensors contiguous and of `dtype`."""
    adapter: Tensors = {}
    for module, product in products.items():
        for role, factor in (("lora_A", product.a), ("lora_B", product.b)):
            adapter[name_of(module, role)] = factor.to(dtype or factor.dtype).contiguous()
    return adapter


def stack(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """sum_i w_i B_i A_i as one product of rank sum r_i: [B_1 B_2 ...] [w_1 A_1; w_2 A_2; ...], in float64.

    The weights go into one factor only; in both they would count twice.
    """
    b = torch.cat([term.b for term in terms], 1).double()
    a = torch.cat([term.a for term in terms]).double()
    if weights is not None:
        ranks = torch.tensor([term.rank for term in terms])
        a *= torch.repeat_interleave(torch.tensor(weights, dtype=torch.float64), ranks)[:, None].to(a.device)
    return LowRank(b, a)


def svd(product: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of B A, at the cost of its inner width: QR of both factors, SVD of the core.

    Returns:
        u: (m, k) with orthonormal columns, k = min(m, n, r).
        s: (k,) singular values, descending.
        v: (k, n) with orthonormal rows.
    """
    left, r_left = torch.linalg.qr(product.b.double())
    right, r_right = torch.linalg.qr(product.a.double().T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return left @ u, s, v @ right.T


def truncated(product: LowRank, rank: int) -> LowRank:
    """The nearest matrix of that rank (Eckart and Young): B = U_r S_r, A = V_r.

    A has orthonormal rows, B the singular values. If `rank` is more than there is, the rest is zero.
    """
    u, s, v = svd(product)
    kept = min(rank, len(s))
    b, a = (u * s)[:, :kept], v[:kept]
    if kept < rank:
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], 1)
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
    return LowRank(b, a)


def norm(product: LowRank) -> float:
    """The Frobenius norm of B A. From QR, not from Gram matrices, whose cancellation would cost half the digits."""
    b, a = product.b.double(), product.a.double()
    if product.rank >= min(b.shape[0], a.shape[1]):
        return float((b @ a).norm())
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


class Sum:
    """A sum of weighted products of one shape, however many: kept in factors until the matrix itself is smaller."""

    def __init__(self) -> None:
        self._terms: list[LowRank] = []
        self._weights: list[float] = []
        self._rank = 0
        self._dense: Tensor | None = None  # (m, n) float64

    def add(self, term: LowRank, weight: float) -> None:
        self._terms.append(term)
        self._weights.append(weight)
        self._rank += term.rank
        if self._rank >= max(FOLD, min(term.b.shape[0], term.a.shape[1])):
            self._fold()

    def add_dense(self, matrix: Tensor, weight: float) -> None:
        """Args:
        matrix: (m, n).
        """
        self._fold()
        scaled = matrix.double() * weight
        self._dense = scaled if self._dense is None else self._dense + scaled

    def norm(self) -> float:
        """The Frobenius norm of the sum so far."""
        if self._dense is None:
            return norm(stack(self._terms, self._weights)) if self._terms else 0.0
        self._fold()
        assert self._dense is not None
        return float(self._dense.norm())

    def _fold(self) -> None:
        if self._terms:
            stacked = stack(self._terms, self._weights)
            matrix = stacked.b @ stacked.a
            self._dense = matrix if self._dense is None else self._dense + matrix
            self._terms, self._weights, self._rank = [], [], 0


def norm_of(sums: Iterable[Sum]) -> float:
    """The Frobenius norm over several layers."""
    return math.hypot(*(one.norm() for one in sums))
