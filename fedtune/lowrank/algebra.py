"""Low-rank algebra: matrices kept as B A, so that nothing of the size of a weight is formed.

Everything is computed in float64. A product, never a factor, is what has a meaning: B A = (B M)(M^-1 A) for any M.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.core.protocol import Tensors

GROWTH = 1e4  # of rounding errors, up to which Q = A^T R^-1 is as good as Q itself
ROLES = ("lora_A", "lora_B")  # of the factors of s B A
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

    def to(self, dtype: torch.dtype) -> "LowRank":
        return LowRank(self.b.to(dtype), self.a.to(dtype))


def name_of(module: str, role: str) -> str:
    """The name of a LoRA factor, as in `...q_proj.lora_A.weight`."""
    return f"{module}.{role}.weight"


def role_of(name: str) -> str:
    """The role of a tensor that `name_of` named, "lora_A" or "lora_B"; "" of any other.

    For those who hold tensors and no layout, whose slots say it.
    """
    return next((role for role in ROLES if name.endswith(name_of("", role))), "")


def factors(adapter: Tensors, *roles: str) -> Tensors:
    """The tensors of these roles, as "lora_B"."""
    endings = tuple(name_of("", role) for role in roles)
    return {name: tensor for name, tensor in adapter.items() if name.endswith(endings)}


def lora_factors(adapter: Tensors) -> dict[str, LowRank]:
    """B and A of each layer, told apart by name, by the module that they adapt."""
    ending = name_of("", "lora_A")
    modules = [name.removesuffix(ending) for name in adapter if name.endswith(ending)]
    return {m: LowRank(adapter[name_of(m, "lora_B")], adapter[name_of(m, "lora_A")]) for m in modules}


def to_adapter(products: Mapping[str, LowRank], dtype: torch.dtype | None = None) -> Tensors:
    """The inverse of `pairs`, with the tensors contiguous and of `dtype`."""
    adapter: Tensors = {}
    for module, product in products.items():
        for role, factor in zip(ROLES, (product.a, product.b), strict=True):
            adapter[name_of(module, role)] = factor.to(dtype or factor.dtype).contiguous()
    return adapter


def stack(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """The sum of w_i B_i A_i as one product of rank sum r_i, in float64: every B_i side by side, every w_i A_i stacked.

    The weights go into one factor only; in both they would count twice.
    """
    b = torch.cat([term.b for term in terms], 1).double()
    a = torch.cat([term.a for term in terms]).double()
    if weights is not None:
        ranks = torch.tensor([term.rank for term in terms])
        a *= torch.repeat_interleave(torch.tensor(weights, dtype=torch.float64), ranks)[:, None].to(a.device)
    return LowRank(b, a)


def truncated_svd(product: LowRank, kept: Callable[[Tensor], int]) -> tuple[LowRank, Tensor]:
    """The leading part of the singular value decomposition U S V^T of B A, at the cost of its inner width: QR of both
    factors, SVD of the small core between them.

    Args:
        kept: how many singular values to keep, given all of them in descending order.

    Returns:
        B = U_r S_r (m, r) and A = V_r^T (r, n), whose rows are orthonormal; and all min(m, n, r) singular values.
    """
    b, a = product.b.double(), product.a.double()
    # Householder QR, not Cholesky: stacked factors of like clients are as good as rank-deficient
    reflectors, tau = torch.geqrf(a.T)
    triangle = reflectors[: reflectors.shape[1]].triu()
    _, s, v = torch.linalg.svd(torch.linalg.qr(b, mode="r").R @ triangle.T, full_matrices=False)
    v = v[: kept(s)]
    # U S = (B A) V, and A V is small: of the two Q, only A's is needed
    return LowRank(b @ (triangle.T @ v.T), _rows(v, a, triangle, (reflectors, tau))), s


def _rows(v: Tensor, a: Tensor, triangle: Tensor, factored: tuple[Tensor, Tensor]) -> Tensor:
    """v Q^T of A^T = Q R."""
    reflectors, tau = factored
    if triangle.shape[0] == triangle.shape[1] and triangle.diagonal().all():
        # v Q^T = (v R^-T) A is off by the growth times the rounding of float64, and takes half the time
        mixed: Tensor = torch.linalg.solve_triangular(triangle, v.T, upper=True).T
        if mixed.norm() * triangle.norm() < GROWTH:
            return mixed @ a
    padded = v.new_zeros(reflectors.shape[0], len(v))
    padded[: v.shape[1]] = v.T
    return torch.ormqr(reflectors[:, : len(tau)], tau, padded).T.contiguous()


def truncated(product: LowRank, rank: int) -> LowRank:
    """The nearest matrix of that rank (Eckart and Young), or of less where there is no more: B = U_r S_r, A = V_r^T."""
    return truncated_svd(product, lambda s: min(rank, len(s)))[0]


def by_energy(product: LowRank, energy: float) -> LowRank:
    """B = U_r S_r and A = V_r^T of the smallest rank, at least 1, whose squared singular values make up the fraction
    `energy` of all. With 1 that is the numerical rank."""

    def rank(s: Tensor) -> int:
        tail = s.square().flip(0).cumsum(0).flip(0)  # from the small end: beside the large values they would be lost
        noise = s[0] * max(product.b.shape[0], product.a.shape[1]) * torch.finfo(s.dtype).eps
        return max(1, int(((tail > (1 - energy) * tail[0]) & (s > noise)).sum()))

    return truncated_svd(product, rank)[0]


def pad_rank(product: LowRank, rank: int, rows: Tensor) -> LowRank:
    """The same matrix with an inner width of `rank`: B goes on in zeros and A, whose rows are orthonormal, in more such
    as far as there are any. Were both zero there, no gradient would ever reach these components.

    Args:
        rows: (rank, n), what the new rows of A are made of.
    """
    missing = rank - product.rank
    if missing <= 0:
        return product
    # What of the rows A doesn't span yet, the most of it first: QR would make something up for what it does span
    beyond = rows.double() - rows.double() @ product.a.T @ product.a
    leading = torch.linalg.svd(beyond, full_matrices=False).Vh
    basis = torch.linalg.qr(torch.cat([product.a, leading]).T).Q.T
    a = torch.cat([product.a, basis[product.rank :], rows.double()])[:rank]
    return LowRank(torch.nn.functional.pad(product.b, (0, missing)), a)


def narrowest(product: LowRank) -> LowRank:
    """The same matrix, no wider inside than its sides: where it would be, as the matrix itself times the identity."""
    m, n = product.b.shape[0], product.a.shape[1]
    if product.rank <= min(m, n):
        return product
    matrix = product.b.double() @ product.a.double()
    identity = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
    return LowRank(identity, matrix) if m <= n else LowRank(matrix, identity)


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
        """Add `weight` times a matrix that is no product of factors.

        Args:
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
