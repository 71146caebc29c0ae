"""Low-rank algebra against the same matrices formed by numpy, on layers that aren't square.

The shapes cover every order of m, n and r: an inner width beyond one side, beyond both, and a rank below the width.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.lowrank.algebra import (
    LowRank,
    Sum,
    by_energy,
    lora_factors,
    narrowest,
    norm,
    norm_of,
    pad_rank,
    stack,
    to_adapter,
    truncated,
    truncated_svd,
)

SHAPES = [(7, 5, 3), (5, 7, 3), (4, 9, 6), (9, 4, 6), (4, 5, 11), (6, 8, 1)]  # m, n, r


def drawn(m, n, r, seed=0):
    rng = np.random.default_rng(seed)
    return LowRank(torch.tensor(rng.standard_normal((m, r))), torch.tensor(rng.standard_normal((r, n))))


def whole(product):
    return product.b.double().numpy() @ product.a.double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_svd_is_that_of_the_matrix(shape):
    product = drawn(*shape)
    found, s = truncated_svd(product, len)
    k = min(shape)
    assert (found.b.shape, s.shape, found.a.shape) == ((shape[0], k), (k,), (k, shape[1]))
    np.testing.assert_allclose(s, np.linalg.svd(whole(product), compute_uv=False)[:k], rtol=1e-12)
    np.testing.assert_allclose(whole(found), whole(product), atol=1e-12)
    np.testing.assert_allclose(found.b.T @ found.b, np.diag(s**2), atol=1e-11)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(k), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 20])
def test_truncation_loses_what_eckart_and_young_allow(shape, rank):
    product = drawn(*shape)
    cut = truncated(product, rank)
    lost = np.linalg.svd(whole(product), compute_uv=False)[rank:]
    assert cut.rank == min(rank, *shape)
    np.testing.assert_allclose(np.linalg.norm(whole(product) - whole(cut)) ** 2, (lost**2).sum(), atol=1e-12)
    np.testing.assert_allclose(cut.a @ cut.a.T, np.eye(cut.rank), atol=1e-12)


def test_truncating_what_was_truncated_is_truncating():
    product = drawn(9, 8, 6)
    np.testing.assert_allclose(whole(truncated(truncated(product, 4), 2)), whole(truncated(product, 2)), atol=1e-12)


def test_the_svd_of_equal_clients_has_no_rank_but_theirs():
    """Stacked factors of rank 3 r that are as good as rank r: Cholesky's QR would fail here."""
    one = drawn(9, 7, 2)
    found, s = truncated_svd(stack([one] * 3, [0.2, 0.3, 0.5]), len)
    np.testing.assert_allclose(whole(found), whole(one), atol=1e-12)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(6), atol=1e-12)
    assert float(s[2]) < 1e-14 * float(s[0])


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6, 1e-9, 1e-15, 0.0])
def test_rows_stay_orthonormal_however_alike_the_clients_are(apart):
    """A_k = A_0 + apart * noise: from well-conditioned stacks to singular ones."""
    first, other = drawn(12, 20, 3, 1), drawn(12, 20, 3, 2)
    stacked = stack([first, LowRank(other.b, first.a + apart * other.a)])
    found, s = truncated_svd(stacked, len)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(6), atol=3e-12)
    np.testing.assert_allclose(whole(found), whole(stacked), atol=1e-11)
    np.testing.assert_allclose(s, np.linalg.svd(whole(stacked), compute_uv=False)[:6], atol=1e-12)


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.5, 1), (0.64, 1), (0.65, 2), (0.92, 2), (0.93, 3), (1.0, 3)],
)
def test_the_smallest_rank_that_reaches_the_energy(energy, rank):
    """Singular values 4, sqrt(7), sqrt(2) and, of four, 0: squares 16 + 7 + 2 = 25, shares 0.64, 0.92, 1."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (9, 6))
    b = u * np.array([4, 7**0.5, 2**0.5, 0])
    # the edges 0.64 and 0.92 are met but for rounding
    cut = by_energy(LowRank(torch.tensor(b), torch.tensor(v.T)), energy - 1e-9 if energy < 1 else 1.0)
    assert cut.rank == rank
    expected = (b[:, :rank]) @ v.T[:rank]
    np.testing.assert_allclose(whole(cut), expected, atol=1e-12)


@given(st.integers(0, 2**32), st.floats(0.01, 1))
def test_no_rank_below_reaches_the_energy(seed, energy):
    product = drawn(8, 6, 5, seed)
    squares = np.linalg.svd(whole(product), compute_uv=False) ** 2
    rank = by_energy(product, energy).rank
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
    assert squares[: rank - 1].sum() < energy * squares.sum()


def test_a_matrix_of_zeros_keeps_one_component():
    zero = LowRank(torch.zeros(4, 2), torch.ones(2, 3))
    assert by_energy(zero, 0.9).rank == 1
    assert norm(truncated(zero, 2)) == 0


def test_weights_count_once():
    one, two = drawn(4, 3, 2, 1), drawn(4, 3, 5, 2)
    stacked = stack([one, two], [0.25, 3.0])
    assert stacked.rank == 7
    np.testing.assert_allclose(whole(stacked), 0.25 * whole(one) + 3 * whole(two), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_narrowest_form_is_the_same_matrix(shape):
    product = drawn(*shape)
    found = narrowest(product)
    assert found.rank == min(shape)
    np.testing.assert_allclose(whole(found), whole(product), atol=1e-12)


def test_new_rows_stay_within_what_the_old_ones_span():
    """A matrix of zeros, whose singular vectors are the first of the rows themselves."""
    rows = drawn(1, 9, 4, 5).a
    wide = pad_rank(truncated(LowRank(torch.zeros(2, 4, dtype=torch.float64), rows), 4), 4, rows)
    np.testing.assert_allclose(rows @ wide.a.T @ wide.a, rows, atol=1e-12)


@pytest.mark.parametrize(("rank", "n"), [(5, 9), (9, 9), (12, 9)])
def test_widening_keeps_the_product_and_leaves_no_dead_component(rank, n):
    product, rows = truncated(drawn(6, n, 3), 3), drawn(1, n, rank, 5).a
    wide = pad_rank(product, rank, rows)
    assert (wide.b.shape, wide.a.shape) == ((6, rank), (rank, n))
    np.testing.assert_allclose(whole(wide), whole(product), atol=1e-12)
    orthonormal = min(rank, n)
    np.testing.assert_allclose(wide.a[:orthonormal] @ wide.a[:orthonormal].T, np.eye(orthonormal), atol=1e-12)
    assert (wide.a.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_that_of_the_matrix(shape):
    product = drawn(*shape)
    np.testing.assert_allclose(norm(product), np.linalg.norm(whole(product)), rtol=1e-12)


def test_the_norm_of_a_difference_of_like_matrices_keeps_its_digits():
    """1e-9 apart: Gram matrices in float64 would see nothing beyond 1e-8."""
    one = drawn(9, 7, 3)
    other = LowRank(one.b * (1 + 1e-9), one.a)
    expected = 1e-9 * np.linalg.norm(whole(one))
    np.testing.assert_allclose(norm(stack([one, other], [1.0, -1.0])), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_sum_is_the_sum_however_it_is_kept(count):
    """40 terms of rank 20 fold into a matrix on the way."""
    terms = [drawn(9, 7, 20, seed) for seed in range(count)]
    total, matrix, plain = Sum(), np.zeros((9, 7)), np.random.default_rng(0).standard_normal((9, 7))
    for place, term in enumerate(terms):
        total.add(term, 0.5 + place)
        matrix += (0.5 + place) * whole(term)
    np.testing.assert_allclose(total.norm(), np.linalg.norm(matrix), rtol=1e-12)
    total.add_dense(torch.tensor(plain), -2.0)
    total.add(terms[0], 3.0)
    matrix += 3 * whole(terms[0]) - 2 * plain
    np.testing.assert_allclose(total.norm(), np.linalg.norm(matrix), rtol=1e-12)
    np.testing.assert_allclose(norm_of([total, total]), 2**0.5 * np.linalg.norm(matrix), rtol=1e-12)


def test_pairs_are_told_by_name():
    """A layer whose width is the rank: shapes alone tell nothing."""
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    found = lora_factors({"x.y.lora_B.weight": b, "x.y.lora_A.weight": a})
    assert found.keys() == {"x.y"}
    assert found["x.y"].a is a
    assert found["x.y"].b is b
    assert to_adapter(found).keys() == {"x.y.lora_A.weight", "x.y.lora_B.weight"}
