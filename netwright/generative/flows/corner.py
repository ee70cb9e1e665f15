"""Convolutions of images that are padded at one corner, and their inverses."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_weight

from netwright import checks
from netwright.errors import CannotReverse
from netwright.reversing.engine import Update

# The dimensions along which an image is turned so that its padding is at the top left.
CORNERS: dict[str, tuple[int, ...]] = {"TL": (), "TR": (3,), "BL": (2,), "BR": (2, 3)}


def corner_convolution(x: Tensor, weight: Tensor, corner: str = "TL") -> Tensor:
    """Return the convolution of `x`, padded with k - 1 rows and columns of zeros at `corner`.

    Shapes: x (batch, channels, height, width); weight (channels, channels, k, k).
    """
    rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
    left, top = (0 if "R" in corner else columns), (0 if "B" in corner else rows)
    with _precisely(x):
        x, weight = _same(x, weight)
        return conv2d(pad(x, (left, columns - left, top, rows - top)), weight)


def inverse_convolution(y: Tensor, weight: Tensor, corner: str = "TL") -> Tensor:
    """Return the `x` of which `corner_convolution(x, weight, corner)` makes `y`.

    All pixels of an anti-diagonal, of all images and channels, are solved for at once by one
    matrix product, and so are the gradients: dL/dy by the same solve from the opposite corner,
    dL/dweight = -(the weight gradient of the convolution at x). Both can be differentiated again.

    Shapes: x and y (batch, channels, height, width); weight (channels, channels, k, k).
    """
    with _precisely(y):
        y, weight = _same(y, weight)
        return _Inverse.apply(y, weight, corner)


def corner_matrix(weight: Tensor, corner: str) -> Tensor:
    """Return what the convolution multiplies a pixel's own channels by."""
    return weight[:, :, 0 if "B" in corner else -1, 0 if "R" in corner else -1]


def log_abs_det(weight: Tensor, corner: str) -> Tensor:
    """Return log |det| of the corner matrix; raise CannotReverse where it is singular."""
    matrix = corner_matrix(weight, corner)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    with _precisely(weight):
        factors = torch.linalg.lu_factor_ex(matrix).LU.diagonal().abs()
    least, most = factors.detach().amin(), factors.detach().amax()
    if not bool(least > torch.finfo(matrix.dtype).eps * len(matrix) * most):
        raise CannotReverse(
            f"weight's corner matrix, weight[:, :, {0 if 'B' in corner else -1}, "
            f"{0 if 'R' in corner else -1}] for {corner}, must be finite and nonsingular for the "
            f"convolution to have an inverse; its least pivot is {float(least):.2g} and its "
            f"greatest {float(most):.2g}; start from another weight, or lower the learning rate")
    return factors.log().sum()


def starting_weight(channels: int, kernel_size: int, corner: str,
                    generator: Generator | None) -> Tensor:
    """Return a random rotation of the channels with small numbers in the rest of the kernel."""
    checks.count(1, channels=channels, kernel_size=kernel_size)
    weight = torch.randn(channels, channels, kernel_size, kernel_size, generator=generator)
    weight *= 0.1 / (channels * max(1, kernel_size ** 2 - 1)) ** 0.5
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    corner_matrix(weight, corner).copy_(rotation)
    return weight


class Convolve(Update):
    """The step of a corner convolution on the streams x and log_det, or of its inverse."""

    def __init__(self, name: str, module: Any, corner: str, *, inverse: bool) -> None:
        super().__init__(name, module, (), (0, 1))
        self.corner, self.backwards = corner, inverse

    def make(self, reads: Sequence[Tensor]) -> Any:
        """Return the weight, and by how much each pixel changes the log-determinant."""
        weight: Tensor = self.module.weight  # type: ignore[union-attr, assignment]
        det = log_abs_det(weight, self.corner)
        return weight, -det if self.backwards else det

    def change(self, x: Sequence[Tensor], made: Any) -> list[Tensor]:
        """Return the convolution, or its inverse, and the new log-determinant."""
        _check(x[0], made[0])
        run = inverse_convolution if self.backwards else corner_convolution
        return [run(x[0], made[0], self.corner), x[1] + self._volume(x, made[1])]

    def restore(self, y: Sequence[Tensor], made: Any) -> list[Tensor]:
        """Return what `change` was given."""
        _check(y[0], made[0])
        run = corner_convolution if self.backwards else inverse_convolution
        return [run(y[0], made[0], self.corner), y[1] - self._volume(y, made[1])]

    def _volume(self, streams: Sequence[Tensor], det: Tensor) -> Tensor:
        return (streams[0].shape[2:].numel() * det).to(streams[1])


class _Inverse(torch.autograd.Function):

    @staticmethod
    def forward(y: Tensor, weight: Tensor, corner: str) -> Tensor:
        return _solved(y, weight, corner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.corner = inputs[2]
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight, x = ctx.saved_tensors
        corner: str = ctx.corner
        opposite = {"TL": "BR", "BR": "TL", "TR": "BL", "BL": "TR"}[corner]
        with _precisely(x):
            # The transposed convolution is one from the other corner, with the kernel turned.
            by_y = _Inverse.apply(grads[0], weight.transpose(0, 1).flip(2, 3), opposite)
            if not ctx.needs_input_grad[1]:
                return by_y, None, None
            rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
            left, top = (0 if "R" in corner else columns), (0 if "B" in corner else rows)
            padded = pad(x, (left, columns - left, top, rows - top))
            return by_y, -conv2d_weight(padded, weight.shape, by_y), None

    @staticmethod
    def jvp(ctx: Any, y: Tensor | None, by_weight: Tensor | None, corner: None) -> Tensor:
        # W * x = y, so that  W * dx = dy - dW * x.
        weight, x = ctx.saved_tensors
        moved = torch.zeros_like(x) if y is None else y
        if by_weight is not None:
            moved = moved - corner_convolution(x, by_weight, ctx.corner)
        return _solved(moved, weight, ctx.corner)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], y: Tensor, weight: Tensor,
             corner: str) -> tuple[Tensor, int]:
        many = y.expand(info.batch_size, *y.shape) if in_dims[0] is None else y.movedim(
            in_dims[0], 0)
        if in_dims[1] is None:
            x = _Inverse.apply(many.flatten(0, 1), weight, corner)
            return x.unflatten(0, (info.batch_size, -1)), 0
        return torch.stack([_Inverse.apply(one, kernel, corner) for one, kernel in
                            zip(many, weight.movedim(in_dims[1], 0), strict=True)]), 0


# PyTorch works the signature out anew at each call, a tenth of the time of a small solve.
_Inverse.forward.__signature__ = inspect.signature(_Inverse.forward)  # type: ignore[attr-defined]


@torch.no_grad()
def _solved(y: Tensor, weight: Tensor, corner: str) -> Tensor:
    """Solve along the anti-diagonals, the pixels of each at once.

    The images are written down skewed, one row of memory for each anti-diagonal i + j, as
    (diagonal, channel, i, image). Then what the kernel covers is a strided view for all pixels of
    a diagonal together, and a diagonal is done by one matrix product in place. What lies outside
    of the image stays zero.
    """
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    turned = CORNERS[corner]
    kernel = _turned(weight.to(kind), turned)
    n, channels, height, width = y.shape
    k, m = kernel.shape[2:]
    if y.numel() == 0:
        return y.clone()
    # x[here] = A^-1 y[here] - A^-1 W x[the others], with the taps in the order (row, column, c).
    taps = kernel.permute(0, 2, 3, 1).reshape(channels, -1)
    inverse = torch.linalg.inv(kernel[:, :, -1, -1])
    taps = -(inverse @ taps[:, :-channels])
    first = inverse @ _turned(y.to(kind), turned).permute(1, 2, 3, 0).reshape(channels, -1)

    before, diagonals = k + m - 2, height + width - 1
    skew = first.new_zeros(before + diagonals, channels, height + k - 1, n)
    d, c, r, _ = skew.stride()
    pixels = skew.as_strided((channels, height, width, n), (c, d + r, d, 1),
                             before * d + (k - 1) * r)
    pixels.copy_(first.view(channels, height, width, n))
    if taps.numel():
        for diagonal in range(1, diagonals):
            low, high = max(0, diagonal - width + 1), min(height, diagonal + 1)
            rows = high - low
            covered = skew.as_strided((k, m, channels, rows, n), (d + r, d, c, r, 1),
                                      diagonal * d + low * r)
            here = skew.as_strided((channels, rows * n), (c, 1),
                                   (before + diagonal) * d + (k - 1 + low) * r)
            here.addmm_(taps, covered.reshape(k * m * channels, rows * n)[:-channels])
    return _turned(pixels.permute(3, 0, 1, 2), turned).to(y.dtype).contiguous()


def _turned(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.flip(axes) if axes else x


def _precisely(x: Tensor) -> Any:
    """Keep autocast out: an inverse in half precision undoes nothing."""
    return torch.autocast(x.device.type, enabled=False)


def _same(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(x.dtype, weight.dtype)
    return x.to(kind), weight.to(kind)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (batch, {weight.shape[1]}, height, width), since the weight "
                         f"has {weight.shape[1]} channels, got {tuple(x.shape)}")
