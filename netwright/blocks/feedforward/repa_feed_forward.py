import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method
from netwright.runtime.padding import real_of

__all__ = ["RePaFeedForward"]


@method(
    "block",
    papers=["004-039"],
    place="feedforward",
    takes=("dim", "hidden"),
    saves=["inference time", "file size", "inference memory"],
    search={"idle_ratio": [0.5, 0.75]},
)
class RePaFeedForward(nn.Module):
    """A feed-forward block most of whose hidden units have no activation, so that they can go.

    y = W_2 n_2([s(u_a), u_i]) + b_2,  [u_a, u_i] = W_1 n_1(x) + b_1;
    n_1 and n_2 are batch norms over all positions, in eval mode affine maps.

    The idle units u_i are trained like the others, and after training `nw.reshape.reparameterize`
    multiplies their two matrices and both norms out into one (dim, dim) matrix: at `idle_ratio`
    0.75 and `hidden` = 4 `dim`, 3 dim^2 numbers instead of 8 dim^2, and the same function.

    The paper has its batch norm where a transformer has a layer norm before the block, which could
    not be multiplied out; here n_1 belongs to the block, and a norm before it may stay or go.

    Args:
        dim: size of the last axis of x and y.
        hidden: how many hidden units, 4 `dim` where none is given.
        idle_ratio: how many of them have no activation, rounded to whole units.
        activation: a name, or what makes a module; it must act on each number by itself.
        norm: whether n_1 and n_2 are there.
        bias: whether the layers have one.

    Shapes: x (*, dim), y (*, dim).

    Raises:
        ValueError: a size is below 1, or `idle_ratio` is below 0 or leaves no unit active.
        UnknownName: no activation is called that.

    Paper: Xu, Li, Chen, Liu, Wang, 2025, RePaViT: Scalable Vision Transformer Acceleration
    via Structural Reparameterization on Feedforward Network Layers.

    >>> import torch
    >>> block = RePaFeedForward(16, 64)
    >>> block(torch.zeros(2, 5, 16)).shape, block.active
    (torch.Size([2, 5, 16]), 16)
    """

    def __init__(self, dim: int, hidden: int | None = None, idle_ratio: float = 0.75, *,
                 activation: Activation = "gelu", norm: bool = True, bias: bool = True) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        checks.count(1, dim=dim, hidden=hidden)
        if idle_ratio < 0 or round(idle_ratio * hidden) >= hidden:
            raise ValueError(f"idle_ratio must be at least 0 and leave one of hidden={hidden} "
                             f"units active, got {idle_ratio}")
        self.active = hidden - round(idle_ratio * hidden)
        self.norm_in = nn.BatchNorm1d(dim) if norm else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = activation_module(activation)
        self.norm_hidden = nn.BatchNorm1d(hidden) if norm else None
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y; in training mode the norms take the statistics of all positions.

        Padding, where it is known (see `feed_attention_mask`), is none of these, and y is 0 there.
        """
        rows = x.reshape(-1, x.shape[-1])
        real = real_of(x) if self.training and self.norm_in is not None else None
        if real is None:
            return self._through(rows).view(x.shape)
        y = self._through(rows[real.reshape(-1)])
        return y.new_zeros(x.shape).masked_scatter(real[..., None], y)

    def _through(self, rows: Tensor) -> Tensor:
        rows = rows if self.norm_in is None else self.norm_in(rows)
        active, idle = self.up(rows).tensor_split([self.active], -1)
        hidden = torch.cat([self.activation(active), idle], -1)
        hidden = hidden if self.norm_hidden is None else self.norm_hidden(hidden)
        y: Tensor = self.down(hidden)
        return y

    @torch.no_grad()
    def merged(self) -> "MergedFeedForward":
        """Return the block without idle units that is this one in eval mode."""
        dtype = self.up.weight.dtype
        scale_in, shift_in = _affine(self.norm_in, self.up.weight[0])
        scale, shift = _affine(self.norm_hidden, self.up.weight[:, 0])
        up, down = self.up.weight.double() * scale_in, self.down.weight.double() * scale
        up_bias = self.up.weight.double() @ shift_in
        up_bias = up_bias if self.up.bias is None else up_bias + self.up.bias
        bias = self.down.weight.double() @ shift
        bias = bias if self.down.bias is None else bias + self.down.bias
        n = self.active
        through, through_bias = down[:, n:] @ up[n:], down[:, n:] @ up_bias[n:] + bias
        block = MergedFeedForward(n, self.down.out_features, self.activation,
                                  torch.cat([up[:n], through]).to(dtype),
                                  torch.cat([up_bias[:n], through_bias]).to(dtype),
                                  down[:, :n].to(dtype))
        return block.requires_grad_(self.up.weight.requires_grad).train(self.training)


class MergedFeedForward(nn.Module):
    """A feed-forward block beside a linear path, which begin with one product; made by merging.

    y = V s(u) + t,  [u, t] = W x + b.

    Shapes: x (*, dim), y (*, dim).

    Paper: Xu, Li, Chen, Liu, Wang, 2025, RePaViT: Scalable Vision Transformer Acceleration
    via Structural Reparameterization on Feedforward Network Layers.

    >>> RePaFeedForward(16, 64).merged()(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, active: int, dim: int, activation: nn.Module, up: Tensor, bias: Tensor,
                 down: Tensor) -> None:
        super().__init__()
        self.active, self.activation = active, activation
        self.up = nn.Linear(up.shape[1], active + dim, device="meta")
        self.up.weight, self.up.bias = nn.Parameter(up), nn.Parameter(bias)
        self.down = nn.Linear(active, dim, bias=False, device="meta")
        self.down.weight = nn.Parameter(down.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        active, through = self.up(x).tensor_split([self.active], -1)
        y: Tensor = self.down(self.activation(active)) + through
        return y


def _affine(norm: nn.BatchNorm1d | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a batch norm multiplies by and adds in eval mode, in float64."""
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return torch.ones_like(like, dtype=torch.double), torch.zeros_like(like,
                                                                           dtype=torch.double)
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale
