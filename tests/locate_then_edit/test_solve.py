"""Closed forms: the dual is the primal, its limits are what they must be, and what cannot be solved is said."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unierase_plugin.errors import EditError
from unierase_plugin.locate_then_edit.solve import JITTERS, LowRank, NullSpace, Ridge, protected_directions

M, D, N = 24, 10, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int = M, samples: int = 200, seed: int = 1) -> Tensor:
    """A second moment as a corpus gives it, anisotropic: eigenvalues over three decades."""
    tokens = random(samples, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return tokens.T @ tokens / samples


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


def protecting(solver: Ridge | NullSpace, earlier: Tensor | None) -> Ridge | NullSpace:
    return solver if earlier is None else solver.protecting(earlier)


def kept_and_free(c: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(c)
    free = values < threshold * values.max()
    return vectors[:, ~free], vectors[:, free]


# --- the dual is the primal -------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 100), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_ridge_is_the_primal_solve_whatever_the_shapes(m: int, d: int, n: int, weight: float, seed: int) -> None:
    """More requests than dimensions (n > m) included."""
    keys, residual, c = random(m, n, seed=seed), random(d, n, seed=seed + 1), weight * moment(m, seed=seed + 2)
    solver = Ridge.of(c)
    got = solver.solve(keys, residual).matrix()
    close(got, reference.ridge(keys, residual, reference.lifted(c, solver.jitter)))


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 20), st.floats(0.1, 50), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_null_space_is_the_primal_solve_with_and_without_earlier_keys(
    m: int, n: int, p: int, rho: float, seed: int
) -> None:
    keys, residual, c = random(m, n, seed=seed), random(D, n, seed=seed + 1), moment(m, seed=seed + 2)
    earlier = random(m, p, seed=seed + 3) if p else None
    got = protecting(NullSpace.of(c, 0.3, rho), earlier).solve(keys, residual).matrix()
    close(got, reference.null_space(keys, residual, c, 0.3, rho, earlier))


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_ridge_protects_the_keys_of_every_earlier_step(m: int, n: int, p: int, q: int, seed: int) -> None:
    """Two steps before, in turn: as if their keys had been in the moment."""
    keys, residual, c = random(m, n, seed=seed), random(D, n, seed=seed + 1), moment(m, seed=seed + 2)
    first, second = random(m, p, seed=seed + 3), random(m, q, seed=seed + 4)
    solver = Ridge.of(c)
    got = solver.protecting(first).protecting(second).solve(keys, residual).matrix()
    whole = reference.lifted(c, solver.jitter) + first @ first.T + second @ second.T
    close(got, reference.ridge(keys, residual, whole))


@pytest.mark.parametrize("solver", ["ridge", "null_space"])
@pytest.mark.parametrize("earlier", [None, random(M, 3, seed=9)], ids=["first", "later"])
def test_the_error_is_that_of_the_equations_and_sees_a_wrong_update(solver: str, earlier: Tensor | None) -> None:
    keys, residual = random(M, N), random(D, N, seed=3)
    made = protecting(Ridge.of(moment()) if solver == "ridge" else NullSpace.of(moment(), 0.3, 1.0), earlier)
    update = made.solve(keys, residual)
    assert made.error(keys, update) < 1e-12
    assert made.error(keys, LowRank(update.up, 1.01 * update.down)) == pytest.approx(0.01, rel=1e-6)
    # Control: keys that the update was not solved for.
    assert made.error(random(M, N, seed=7), update) > 0.1


def test_the_condition_number_is_that_of_the_matrix() -> None:
    ridge = Ridge.of(moment())
    wanted = float(torch.linalg.cond(reference.lifted(moment(), ridge.jitter)))
    assert ridge.condition() == pytest.approx(wanted, rel=0.05)
    null = NullSpace.of(moment(), 0.3, 2.0)
    assert null.condition() == 1.0
    _, free = kept_and_free(moment(), 0.3)
    inside = free.T @ random(M, 3)
    wanted = float(torch.linalg.cond(2.0 * torch.eye(len(inside)).double() + inside @ inside.T))
    assert null.protecting(random(M, 3)).condition() == pytest.approx(wanted, rel=1e-9)


def test_ridge_solves_float32_inputs_in_float64() -> None:
    keys, residual, c = random(M, N).float(), random(D, N, seed=3).float(), moment().float()
    made = Ridge.of(c)
    assert made.solve(keys, residual).down.dtype == torch.float64
    close(made.solve(keys, residual).matrix(), reference.ridge(keys, residual, reference.lifted(c, made.jitter)))


@pytest.mark.parametrize("earlier", [None, 3], ids=["first", "later"])
@pytest.mark.parametrize("rho", [10.0, 1e-6])
def test_null_space_solves_float32_keys_in_float64(rho: float, earlier: int | None) -> None:
    keys, residual = random(M, N).float(), random(D, N, seed=3)
    past = None if earlier is None else random(M, earlier, seed=9)
    got = protecting(NullSpace.of(moment(), 0.3, rho), past).solve(keys, residual)
    assert got.down.dtype == torch.float64
    close(got.matrix(), reference.null_space(keys, residual, moment(), 0.3, rho, past), 1e-7)


@given(st.integers(2, 40), st.floats(1e-4, 0.9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_protected_and_free_directions_are_the_whole_space_cut_at_the_threshold(
    m: int, threshold: float, seed: int
) -> None:
    c = moment(m, seed=seed)
    kept, free = kept_and_free(c, threshold)
    if not free.shape[1]:
        with pytest.raises(EditError, match="nullspace_threshold"):
            protected_directions(c, threshold)
        return
    found = protected_directions(c, threshold)
    assert found.shape == kept.shape
    close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64), 1e-12)
    close(found @ found.T, kept @ kept.T, 1e-8)


# --- what a low-rank update is ----------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_norm_is_that_of_the_dense_matrix(d: int, m: int, n: int, seed: int) -> None:
    update = LowRank(random(d, n, seed=seed), random(n, m, seed=seed + 1))
    assert update.norm() == pytest.approx(float(update.matrix().norm()), rel=1e-9)


def test_norm_of_no_update_is_zero() -> None:
    assert LowRank(torch.zeros(D, N), random(N, M)).norm() == 0.0


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("made", [Ridge.of(moment()), NullSpace.of(moment(), 0.3, 1.0)], ids=["ridge", "null_space"])
def test_an_update_has_at_most_the_rank_of_its_requests(made: Ridge | NullSpace, n: int) -> None:
    update = made.solve(random(M, n), random(D, n, seed=2))
    assert update.up.shape == (D, n)
    assert update.down.shape == (n, M)
    assert int(torch.linalg.matrix_rank(update.matrix())) == n


# --- ridge: the limits ------------------------------------------------------------------------------------------------


def test_an_infinite_weight_on_the_corpus_gives_no_update() -> None:
    keys, residual = random(M, N), random(D, N, seed=2)
    norms = [Ridge.of(weight * moment()).solve(keys, residual).norm() for weight in (1.0, 1e3, 1e6, 1e12)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6 < norms[0]


def test_no_weight_on_the_corpus_fits_every_key() -> None:
    keys, residual = random(M, N), random(D, N, seed=2)
    errors = [
        float((Ridge.of(weight * moment()).solve(keys, residual).matrix() @ keys - residual).norm())
        for weight in (1.0, 1e-3, 1e-9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * float(residual.norm()) < errors[0]


def test_more_requests_than_dimensions_are_fitted_by_least_squares_as_the_weight_goes() -> None:
    keys, residual = random(M, 3 * M), random(D, 3 * M, seed=2)
    got = Ridge.of(1e-6 * moment()).solve(keys, residual).matrix()
    close(got, torch.linalg.lstsq(keys.T, residual.T).solution.T, 1e-4)


def test_a_direction_that_the_corpus_uses_more_is_moved_less() -> None:
    """The least change of the corpus' outputs: tr(Delta C Delta^T) is no larger than that of any other exact fit."""
    keys, residual, c = random(M, N), random(D, N, seed=2), moment()
    ours = Ridge.of(1e-9 * c).solve(keys, residual).matrix()
    plain = residual @ torch.linalg.pinv(keys)
    close(plain @ keys, ours @ keys, 1e-6)
    assert float((ours @ c @ ours.T).trace()) < 0.9 * float((plain @ c @ plain.T).trace())


# --- null space: what is protected ------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [None, random(M, 3, seed=9)], ids=["first", "later"])
def test_protected_directions_are_not_moved(earlier: Tensor | None) -> None:
    kept, free = kept_and_free(moment(), 0.3)
    update = protecting(NullSpace.of(moment(), 0.3, 1.0), earlier).solve(random(M, N), random(D, N, seed=2)).matrix()
    assert kept.shape[1] >= 3
    assert float((update @ kept).norm()) < 1e-12
    # Control: what is free does move.
    assert float((update @ free).norm()) > 1e-2


def test_keys_within_the_protected_directions_keep_their_outputs() -> None:
    kept, _ = kept_and_free(moment(), 0.3)
    update = NullSpace.of(moment(), 0.3, 1.0).solve(random(M, N), random(D, N, seed=2)).matrix()
    ordinary = kept @ random(kept.shape[1], 50, seed=5)
    assert float((update @ ordinary).norm()) < 1e-12 * float(ordinary.norm()) * 10


def test_requests_within_the_protected_directions_cannot_be_edited() -> None:
    kept, _ = kept_and_free(moment(), 0.3)
    update = NullSpace.of(moment(), 0.3, 1.0).solve(kept @ random(kept.shape[1], N), random(D, N, seed=2))
    assert update.norm() < 1e-12


def test_earlier_keys_move_less_when_they_are_known_and_rho_is_small() -> None:
    """With room for both, earlier keys are left alone and the new ones still reach their residual."""
    keys, residual, earlier = random(M, 3), random(D, 3, seed=2), random(M, 3, seed=9)
    free = NullSpace.of(moment(), 0.3, 1e-8).solve(keys, residual).matrix()
    careful = NullSpace.of(moment(), 0.3, 1e-8).protecting(earlier).solve(keys, residual).matrix()
    assert float((free @ earlier).norm()) > 0.1
    assert float((careful @ earlier).norm()) < 1e-5
    close(careful @ keys, residual, 1e-5)


# --- what cannot be solved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3, M // 2])
def test_a_singular_moment_is_lifted_and_says_so(samples: int) -> None:
    c = moment(samples=samples)
    solver = Ridge.of(c)
    assert solver.jitter in JITTERS
    got = solver.solve(random(M, N), random(D, N, seed=2)).matrix()
    close(got, reference.ridge(random(M, N), random(D, N, seed=2), reference.lifted(c, solver.jitter)), 1e-6)


def test_a_moment_that_rounding_made_indefinite_takes_a_larger_lift() -> None:
    c = moment(samples=3)
    c -= 5e-4 * c.diagonal().mean() * torch.eye(M, dtype=torch.float64)
    assert Ridge.of(c).jitter == 1e-3
    assert Ridge.of(moment()).jitter == JITTERS[0]


@pytest.mark.parametrize(
    "bad", [torch.zeros(M, M), torch.full((M, M), math.nan), torch.full((M, M), math.inf), -moment()]
)
def test_a_moment_that_is_none_is_refused(bad: Tensor) -> None:
    with pytest.raises(EditError, match="second moment"):
        Ridge.of(bad)


def test_an_indefinite_moment_is_refused() -> None:
    c = moment()
    c[0, 0] = -1.0
    with pytest.raises(EditError, match="not positive definite"):
        Ridge.of(c)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_null_space_of_nan_is_refused(bad: float) -> None:
    with pytest.raises(EditError, match="NaN or infinity"):
        NullSpace.of(torch.full((M, M), bad), 0.3, 1.0)


@pytest.mark.parametrize(
    ("c", "message"), [(torch.eye(M), "Raise nullspace_threshold"), (torch.zeros(M, M), "C is zero")]
)
def test_an_empty_null_space_is_refused(c: Tensor, message: str) -> None:
    with pytest.raises(EditError, match=message):
        NullSpace.of(c, 0.02, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("made", [Ridge.of(moment()), NullSpace.of(moment(), 0.3, 1.0)], ids=["ridge", "null_space"])
def test_degenerate_keys_are_refused(made: Ridge | NullSpace, bad: float) -> None:
    keys = random(M, N)
    keys[2, 1] = bad
    with pytest.raises(EditError, match="degenerate"):
        made.solve(keys, random(D, N))


def test_two_requests_with_one_key_share_their_residual() -> None:
    """Equal keys are no error: the same key cannot give two outputs, so their mean is given."""
    keys, residual = random(M, 2), random(D, 2, seed=2)
    keys[:, 1] = keys[:, 0]
    update = Ridge.of(1e-6 * moment()).solve(keys, residual).matrix()
    close(update @ keys[:, 0], residual.mean(dim=1), 1e-5)
