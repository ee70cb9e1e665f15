"""Derivatives along directions, by forward-mode differentiation, with nothing kept for backward."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from netwright.runtime.random_state import RandomState, random_state, replaying


@contextmanager
def plain_kernels(network: nn.Module) -> Iterator[None]:
    """Avoid what has no forward-mode derivative, or a wrong one.

    Fused attention and transformers' fused experts have none; under autocast the derivatives of
    norms come back in another dtype than their values.
    """
    found: list[Any] = [getattr(module, "config", None) for module in network.modules()]
    configs = {id(c): c for c in found if hasattr(c, "_experts_implementation")}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        with sdpa_kernel(SDPBackend.MATH), ExitStack() as full_precision:
            for device in {p.device.type for p in network.parameters()}:
                full_precision.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


class DirectionalDerivative:
    """A function of a network and its derivatives in many directions, as if it had run once.

    `function(buffers, *primals)` runs the network on those buffers. All its runs see the same
    buffers and draw the same random numbers. The first run is what the network and the global
    random state keep, unless `state` is given: then every run starts from that state, and
    nothing is kept.

    `vectorised` says whether a run takes many directions at once; it turns False when the
    network turns out not to allow that (a module changes a tensor of its own that is not one of
    its buffers, for instance).
    """

    def __init__(self, network: nn.Module, function: Callable[..., Tensor], *,
                 vectorised: bool = True, state: RandomState | None = None) -> None:
        self.network, self.function = network, function
        self.vectorised, self.state = vectorised, state
        self.buffers = list(network.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]

    def __call__(self, primals: Sequence[Tensor],
                 directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the value (*size) and its derivatives (n, *size) in the n `directions`.

        Shapes: primals[i] (*size_i); directions[i] (n, *size_i).
        """
        if self.vectorised and len(directions[0]) > 1:
            start = random_state()
            try:
                return self._run(self._at_once, primals, directions)
            except RuntimeError:
                # What vmap cannot do is done one direction at a time; an error of the network's
                # own comes up there again.
                self.vectorised = False
                torch.set_rng_state(start[0])
                if start[1]:
                    torch.cuda.set_rng_state_all(start[1])
        results = [self._run(self._single, primals, [v[i] for v in directions])
                   for i in range(len(directions[0]))]
        return results[0][0], torch.stack([derivative for _, derivative in results])

    def _run(self, evaluate: Callable[..., tuple[Tensor, Tensor, list[Tensor]]],
             primals: Sequence[Tensor], directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), plain_kernels(self.network):
            if self.state is not None:
                with replaying(self.state):
                    return evaluate(primals, directions)[:2]
            state = random_state()
            value, derivative, buffers = evaluate(primals, directions)
            for buffer, new in zip(self.buffers, buffers, strict=True):
                buffer.copy_(new)
            self.state = state
            return value, derivative

    def _with_buffers(self, *primals: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Cloned in here, since a transformed function may only change what it has made itself.
        buffers = [value.clone() for value in self.before]
        return self.function(buffers, *primals), buffers

    def _single(self, primals: Sequence[Tensor],
                directions: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        try:
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, directions,
                                                                    strict=True)]
                output, buffers = self._with_buffers(*duals)
                value, derivative = forward_ad.unpack_dual(output)
                if derivative is None:  # the value does not depend on what was perturbed
                    derivative = torch.zeros_like(value)
                buffers = [forward_ad.unpack_dual(buffer).primal for buffer in buffers]
        except NotImplementedError as error:
            raise TypeError("network must have forward-mode derivatives, and one of its "
                            f"operations has none ({str(error).splitlines()[0]}); replace that "
                            "operation, or give its autograd.Function a jvp") from error
        return value, derivative, buffers

    def _at_once(self, primals: Sequence[Tensor],
                 directions: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        def along(*v: Tensor) -> Any:
            return jvp(self._with_buffers, tuple(primals), v, has_aux=True)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            once_each_once: Any = (None, 0, None)
            return vmap(along, out_dims=once_each_once, randomness="same")(*directions)


def run_with(network: nn.Module, run: Callable[[], Tensor], tensors: Sequence[Tensor],
             values: Sequence[Tensor]) -> Tensor:
    """Return `run()`, with `values` in place of those parameters and buffers of `network`."""
    value = {id(tensor): v for tensor, v in zip(tensors, values, strict=True)}
    # Each module is named once: functional_call's own tying leaves a module that is used twice
    # with the values.
    named = {f"network.{prefix}.{name}" if prefix else f"network.{name}": value[id(tensor)]
             for prefix, module in network.named_modules()
             for name, tensor in [*module.named_parameters(recurse=False),
                                  *module.named_buffers(recurse=False)] if id(tensor) in value}
    return functional_call(_Runs(network, run), named, (), tie_weights=False)


class _Runs(nn.Module):
    def __init__(self, network: nn.Module, run: Callable[[], Tensor]) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self) -> Tensor:
        return self.run()


def draw(distribution: str, shape: Sequence[int], like: Tensor,
         generator: Generator | None) -> Tensor:
    """Return numbers of mean 0 and variance 1, `"normal"` or `"rademacher"` (-1 or 1)."""
    device = like.device if generator is None else generator.device
    if distribution == "normal":
        drawn = torch.randn(*shape, generator=generator, device=device, dtype=like.dtype)
    else:
        bits = torch.randint(2, shape, generator=generator, device=device)
        drawn = (2 * bits - 1).to(like.dtype)
    return drawn.to(like.device)
