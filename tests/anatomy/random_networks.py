"""Small networks drawn at random, of what moves, mixes, cuts and joins channels."""

import random

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A chain of drawn steps on pictures (batch, channels, 4, 4) or rows, and a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.parts, self.steps = nn.ModuleList(), []
        self.picture = draw.random() < 0.6
        self.width = draw.choice([4, 6, 8, 12])
        h = self._put(nn.Conv2d(3, self.width, 3, padding=1) if self.picture
                      else nn.Linear(3, self.width))
        self.steps.append(lambda s, x, h=h: s.parts[h](x))
        for _ in range(draw.randint(2, 6)):
            kinds = self._pictures() if self.picture else self._rows()
            draw.choice([*kinds, *self._both()])(draw)
        if self.picture:
            self.steps.append(draw.choice([lambda s, x: x.flatten(1), lambda s, x: x.mean((2, 3)),
                                           lambda s, x: x.flatten(2).transpose(1, 2).flatten(1)]))
            width = None
        else:
            width = self.width
        self.steps.append(lambda s, x: x)
        last = nn.LazyLinear(3) if width is None else nn.Linear(width, 3)
        h = self._put(last)
        self.steps.append(lambda s, x, h=h: s.parts[h](x))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x

    def _put(self, part: nn.Module) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    def _both(self):
        return [self._activation, self._halves, self._residual, self._cat, self._shuffle,
                self._gate, self._cut, self._parameter, self._roll, self._stacked, self._written,
                self._product_of_halves, self._softmax, self._heads]

    def _pictures(self):
        return [self._convolution, self._convolution, self._depthwise, self._group_norm,
                self._batch_norm, self._pool, self._transposed, self._pixels, self._squeeze]

    def _rows(self):
        return [self._linear, self._linear, self._layer_norm, self._low_rank, self._attention,
                self._tied]

    def _layer(self, inputs: int, outputs: int, groups: int = 1) -> int:
        if self.picture:
            return self._put(nn.Conv2d(inputs, outputs, 1, groups=groups))
        return self._put(nn.Linear(inputs, outputs))

    def _activation(self, draw) -> None:
        chosen = draw.choice([torch.relu, torch.tanh, nn.functional.gelu, torch.sigmoid])
        self.steps.append(lambda s, x: chosen(x))

    def _linear(self, draw) -> None:
        new = draw.choice([4, 6, 8, 12])
        h = self._put(nn.Linear(self.width, new))
        self.steps.append(lambda s, x: s.parts[h](x))
        self.width = new

    def _convolution(self, draw) -> None:
        new = draw.choice([4, 6, 8, 12])
        groups = draw.choice([g for g in (1, 2, 3, 4) if self.width % g == 0 and new % g == 0])
        h = self._put(nn.Conv2d(self.width, new, 3, padding=1, groups=groups))
        self.steps.append(lambda s, x: s.parts[h](x))
        self.width = new

    def _depthwise(self, draw) -> None:
        times = draw.choice([1, 1, 2])
        h = self._put(nn.Conv2d(self.width, self.width * times, 3, padding=1, groups=self.width))
        self.steps.append(lambda s, x: s.parts[h](x))
        self.width *= times

    def _transposed(self, draw) -> None:
        groups = draw.choice([g for g in (1, 2) if self.width % g == 0])
        h = self._put(nn.ConvTranspose2d(self.width, 8, 3, padding=1, groups=groups))
        self.steps.append(lambda s, x: s.parts[h](x))
        self.width = 8

    def _batch_norm(self, _) -> None:
        norm = nn.BatchNorm2d(self.width)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        h = self._put(norm)
        self.steps.append(lambda s, x: s.parts[h](x))

    def _group_norm(self, draw) -> None:
        groups = draw.choice([g for g in (1, 2, 3, 4) if self.width % g == 0])
        norm = nn.GroupNorm(groups, self.width)
        h = self._put(norm)
        self.steps.append(lambda s, x: s.parts[h](x))

    def _layer_norm(self, _) -> None:
        h = self._put(nn.LayerNorm(self.width))
        self.steps.append(lambda s, x: s.parts[h](x))

    def _pool(self, draw) -> None:
        self.steps.append(draw.choice([
            lambda s, x: nn.functional.max_pool2d(x, 3, 1, 1),
            lambda s, x: nn.functional.avg_pool2d(x, 3, 1, 1),
            lambda s, x: nn.functional.pad(x, (0, 1, 0, 1))[..., 1:, 1:]]))

    def _pixels(self, _) -> None:
        if self.width % 4 == 0:
            self.steps.append(lambda s, x: nn.functional.pixel_unshuffle(
                nn.functional.pixel_shuffle(x, 2), 2))

    def _squeeze(self, _) -> None:
        down, up = self._put(nn.Linear(self.width, 4)), self._put(nn.Linear(4, self.width))
        self.steps.append(lambda s, x: x * torch.sigmoid(s.parts[up](torch.relu(
            s.parts[down](x.mean((2, 3))))))[..., None, None])

    def _halves(self, _) -> None:
        half = self.width // 2
        self.steps.append(lambda s, x: torch.cat([x[:, half:], x[:, :half]], 1))

    def _roll(self, _) -> None:
        self.steps.append(lambda s, x: x + 0.5 * x.roll(1, 1))

    def _cut(self, _) -> None:
        half = self.width // 2
        h = self._layer(half, self.width - half)
        self.steps.append(lambda s, x: torch.cat([x[:, :half], s.parts[h](x[:, :half])], 1))

    def _residual(self, _) -> None:
        h, g = self._layer(self.width, 6), self._layer(6, self.width)
        self.steps.append(lambda s, x: x + s.parts[g](torch.relu(s.parts[h](x))))

    def _cat(self, draw) -> None:
        new = draw.choice([2, 4])
        h = self._layer(self.width, new)
        order = draw.random() < 0.5
        self.steps.append(lambda s, x: torch.cat([x, s.parts[h](x)] if order
                                              else [s.parts[h](x), x, x], 1))
        self.width += new if order else new + self.width

    def _shuffle(self, draw) -> None:
        groups = draw.choice([g for g in (2, 3, 4) if self.width % g == 0])
        self.steps.append(lambda s, x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2))

    def _gate(self, draw) -> None:
        h, g = self._layer(self.width, 8), self._layer(self.width, 8)
        self.steps.append(lambda s, x: nn.functional.silu(s.parts[h](x)) * s.parts[g](x))
        self.width = 8

    def _product_of_halves(self, _) -> None:
        self.steps.append(lambda s, x: nn.functional.glu(x, 1))
        self.width //= 2
        if self.width % 2:
            h = self._layer(self.width, 4)
            self.steps.append(lambda s, x: s.parts[h](x))
            self.width = 4

    def _parameter(self, draw) -> None:
        shape = (self.width, 1, 1) if self.picture else (self.width,)
        name = f"p{len(self.steps)}"
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.steps.append(lambda s, x: x * getattr(s, name) if draw else x)

    def _stacked(self, _) -> None:
        h = self._layer(self.width, self.width)
        self.steps.append(lambda s, x: torch.stack([x, s.parts[h](x)], 1).sum(1))

    def _written(self, _) -> None:
        half = self.width // 2
        h = self._layer(self.width, half)

        def step(s, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[:, :half] = s.parts[h](x)
            y[:, half:] = x[:, half:]
            return y
        self.steps.append(step)

    def _softmax(self, _) -> None:
        self.steps.append(lambda s, x: x + x.softmax(1))

    def _heads(self, draw) -> None:
        heads = draw.choice([g for g in (2, 3, 4) if self.width % g == 0])
        self.steps.append(lambda s, x: _normed(x.unflatten(1, (heads, -1))).flatten(1, 2))

    def _low_rank(self, _) -> None:
        names = (f"a{len(self.steps)}", f"b{len(self.steps)}")
        for name, shape in zip(names, ((self.width, 4), (4, self.width)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.steps.append(lambda s, x: x @ (getattr(s, names[0]) @ getattr(s, names[1])))

    def _attention(self, draw) -> None:
        heads, shared = draw.choice([(4, 4), (4, 2), (2, 1)])
        q = self._put(nn.Linear(self.width, heads * 3))
        k, v = (self._put(nn.Linear(self.width, shared * 3)) for _ in range(2))
        out = self._put(nn.Linear(heads * 3, self.width))
        turned = draw.random() < 0.5

        def step(s, x: Tensor) -> Tensor:
            a, b, c = (s.parts[i](x).unflatten(-1, (-1, 3)).transpose(0, 1) for i in (q, k, v))
            b, c = (t.repeat_interleave(heads // shared, 0) for t in (b, c))
            if turned:
                a, b = a + a.flip(-1), b * 2
            mixed = (a @ b.mT).softmax(-1) @ c
            return x + s.parts[out](mixed.transpose(0, 1).flatten(1))
        self.steps.append(step)

    def _tied(self, _) -> None:
        h = self._put(nn.Linear(self.width, 6))
        self.steps.append(lambda s, x: nn.functional.linear(torch.relu(s.parts[h](x)),
                                                         s.parts[h].weight.T))


def _normed(x: Tensor) -> Tensor:
    return x / (1 + x.square().mean(2, keepdim=True)).sqrt()


def drawn(seed: int) -> tuple[nn.Module, Tensor]:
    """Return a network in double precision and eval mode, and an input."""
    torch.manual_seed(seed)
    network = Network(seed)
    x = torch.randn((2, 3, 4, 4) if network.picture else (5, 3), dtype=torch.float64)
    network.double()
    network(x)
    return network.eval(), x
