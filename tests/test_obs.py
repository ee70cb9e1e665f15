import pytest
import torch
from torch import Tensor

from netwright.obs import sweep


def problem(rows: int = 5, columns: int = 12, samples: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x, x


def kept(w: Tensor, *_) -> Tensor:
    return w[:, 0]


def rounded(w: Tensor, *_) -> Tensor:
    return (w[:, 0] * 2).round() / 2


@pytest.mark.parametrize("q", [0, 4, 11])
def test_one_pruned_weight_is_the_optimal_brain_surgeons(q) -> None:
    weight, hessian, _ = problem(rows=1)
    order = torch.tensor([q, *(i for i in range(12) if i != q)])
    swept = sweep(weight, hessian, lambda w, _, i: 0 * w[:, 0] if i == 0 else w[:, 0],
                  damping=0.0, order=order)
    inverse = torch.linalg.inv(hessian)
    delta = -weight[0, q] / inverse[q, q] * inverse[:, q]
    assert torch.allclose(swept.weight[0], weight[0] + delta, atol=1e-8)
    assert swept.loss == pytest.approx(float(weight[0, q] ** 2 / (2 * inverse[q, q])))
    rest = [i for i in range(12) if i != q]  # brute force: least squares of the others
    best = torch.linalg.solve(hessian[rest][:, rest], hessian[rest] @ weight[0])
    assert torch.allclose(swept.weight[0, rest], best, atol=1e-8)


def test_the_loss_is_half_the_squared_error() -> None:
    weight, hessian, x = problem()
    swept = sweep(weight, hessian, rounded, damping=0.0)
    error = (x @ (swept.weight - weight).T).square().sum()
    assert swept.loss == pytest.approx(float(error) / 2)


@pytest.mark.parametrize("block", [1, 3, 5, 12])
def test_blocks_make_no_difference(block) -> None:
    weight, hessian, _ = problem()
    whole = sweep(weight, hessian, rounded, block=128)
    assert torch.allclose(sweep(weight, hessian, rounded, block=block).weight, whole.weight,
                          atol=1e-9)


def test_what_stays_stays() -> None:
    weight, hessian, _ = problem()
    swept = sweep(weight.float(), hessian.float(), kept)
    assert torch.equal(swept.weight, weight.float())
    assert (swept.loss, swept.note) == (0.0, "")


def test_it_errs_less_than_rounding_to_nearest() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
        weight = torch.randn(8, 24, generator=generator)
        swept = sweep(weight, x.T @ x, rounded).weight
        nearest = (weight * 2).round() / 2
        assert ((swept - weight) @ x.T).norm() < ((nearest - weight) @ x.T).norm()


def test_two_of_four_with_updates() -> None:
    weight, hessian, x = problem()
    gone = torch.zeros_like(weight, dtype=torch.bool)

    def become(w: Tensor, diagonal: Tensor, i: int) -> Tensor:
        if i % 4 == 0:
            scores = (w[:, :4] / diagonal[:4]).square()
            gone[:, i:i + 4].scatter_(1, scores.argsort(1)[:, :2], True)
        return w[:, 0].masked_fill(gone[:, i], 0)
    swept = sweep(weight, hessian, become)
    assert bool(((swept.weight != 0).reshape(5, 3, 4).sum(2) == 2).all())
    masked = weight.masked_fill(gone, 0)
    assert ((swept.weight - weight) @ x.T).norm() < ((masked - weight) @ x.T).norm()


def test_dead_inputs_and_matrices_without_a_factor() -> None:
    weight, hessian, _ = problem()
    hessian[3] = hessian[:, 3] = 0
    swept = sweep(weight, hessian, lambda w, _, i: w[:, 0] if i == 3 else w[:, 0].round())
    assert torch.equal(swept.weight[:, 3], weight[:, 3])
    assert bool(torch.isfinite(swept.weight).all())
    low = torch.ones(12, 12, dtype=torch.float64) - 0.05 * torch.eye(12, dtype=torch.float64)
    damped = sweep(weight, low, rounded)
    assert damped.damping == pytest.approx(0.1)
    assert damped.note == "damping 0.1 in place of 0.01"
    zero = sweep(weight, torch.zeros(12, 12), rounded)
    assert torch.equal(zero.weight, (weight * 2).round() / 2)


def test_errors() -> None:
    weight, hessian, _ = problem()
    with pytest.raises(ValueError, match="weight must be"):
        sweep(weight[0], hessian, kept)
    with pytest.raises(ValueError, match=r"hessian must be \(12, 12\)"):
        sweep(weight, hessian[:3], kept)
    with pytest.raises(ValueError, match="hessian must be finite"):
        sweep(weight, hessian * float("nan"), kept)
    with pytest.raises(ValueError, match="block must be"):
        sweep(weight, hessian, kept, block=0)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        sweep(weight, hessian, kept, damping=-1)
    with pytest.raises(ValueError, match="order must have each"):
        sweep(weight, hessian, kept, order=torch.zeros(12, dtype=torch.long))
    with pytest.raises(ValueError, match="positive semi-definite"):
        sweep(weight, hessian - 1e12 * torch.diag(torch.arange(12.0)), kept)
