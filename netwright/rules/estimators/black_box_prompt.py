from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.estimators._evolution import Evolution
from netwright.rules.rule import Rule, chain_of, checked
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import Stages, call

__all__ = ["BlackBoxPrompt"]


class Prompt(nn.Module):
    """What is added to the signal that one stage takes: A z, with the search for z."""

    projection: Tensor

    def __init__(self, stage: str, signal: Tensor, tokens: int, *, dimension: int,
                 population: int, step: float, generator: Generator | None) -> None:
        super().__init__()
        self.stage, self.tokens = stage, tokens
        shape = (tokens, signal.shape[-1]) if tokens else tuple(signal.shape[1:])
        self.weight = Parameter(signal.new_zeros(shape))
        self.search = Evolution(min(dimension, self.weight.numel()), step=step,
                                population=population, generator=generator)
        device = signal.device if generator is None else generator.device
        drawn = torch.randn(self.search.dimension, self.weight.numel(), generator=generator,
                            device=device)
        spread = signal.float().std(correction=0)
        scale = torch.where(spread > 0, spread, 1.0) / self.search.dimension ** 0.5
        self.register_buffer("projection", drawn.to(signal) * scale.to(signal))

    def of(self, z: Tensor) -> Tensor:
        """Return the prompt that `z` stands for."""
        return (z.to(self.projection) @ self.projection).view_as(self.weight)

    def added(self, h: Tensor, after: int) -> Tensor:
        """Return `h` with the prompt added in its places, or to all of it."""
        if not self.tokens:
            if h.shape[1:] != self.weight.shape:
                raise ValueError(f"x must give stage {self.stage} a signal of shape (batch, "
                                 f"{', '.join(map(str, self.weight.shape))}) as the example did, "
                                 f"got {tuple(h.shape)}; keep the input's size")
            return h + self.weight
        before, _, rest = h.split([after, self.tokens, h.shape[1] - after - self.tokens], 1)
        places = h[:, after:after + self.tokens] + self.weight.to(h.dtype)
        return torch.cat([before, places, rest], 1)


@method(
    "rule",
    papers=["003-154"],
    saves=["backpropagation", "derivatives"],
    needs=["labels", "a transformer"],
    search={"step": (0.1, 2.0)},
    variants={"small": {"dimension": 4, "population": 4}},
)
class BlackBoxPrompt(Rule):
    """Tune prompts at every layer of a frozen network by an evolution strategy, layer by layer.

    p_i = A_i z_i;  A_i ~ N(0, std(h_i)^2 / dimension), fixed;  for i = 1..layers: draw z_ik from
    layer i's CMA-ES, k = 1..population; l_k = L with p_i = A_i z_ik; move its distribution towards
    the z_ik of low l_k; z_i := the distribution's mean.

    The network is only run, in eval mode: its parameters stay bit for bit as they were, and there
    is no gradient anywhere. A call is one generation of each layer in turn, `population` forward
    passes each. What is learned are the prompts: `dimension` numbers a layer (or as many as the
    prompt has).

    Where the input is token numbers, (batch, length) or a mapping's `input_ids`, `tokens` places
    are put into each row after its first `after` tokens, masks grown to fit, and p_i is added to
    what layer i takes there; scores for single tokens come back without those places. Any other
    network has no place to put: p_i, of the shape of a sample's signal, is added to all of it. A
    stage whose input is no floats, or whose prompt cannot reach the scores, has none.

    `layers="first"` tunes the first prompt alone. The returned loss is the mean over all
    candidates.

    Args:
        tokens: places of the prompt, where the input is token numbers.
        dimension: numbers that the strategy searches over, for each layer.
        population: candidates of a generation, at least 4.
        step: the strategy's first standard deviation, above 0.
        after: tokens of a row that stand before the prompt.
        layers: "all", or "first" for the input's prompt alone.

    Shapes: h_i (batch, length, width); p_i (tokens, width), or like a sample's h_i; z_i
    (dimension,); A_i (dimension, numbers of p_i).

    Raises:
        MissingExtra: `cma` is not installed.
        ValueError: an option is out of its range, `example` is missing, no stage takes a prompt,
            or a batch's signal has another shape than the example's where it matters.

    Papers: Sun, Shao, Qian, Huang, Qiu, 2022, Black-Box Tuning for Language-Model-as-a-Service
    (the first layer's); Sun, He, Qian, Zhou, Huang, Qiu, 2022, BBTv2: Towards a Gradient-Free
    Future with Large Language Models. It keeps each layer's best candidate; the mean here does
    not hang on one lucky draw or batch. It bounds z, and shifts A to the mean of h_i; not here.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(6, 4), torch.tensor([0, 2, 1, 0, 2, 1])
    >>> rule = BlackBoxPrompt(network, x, population=6)
    >>> [tuple(prompt.weight.shape) for prompt in rule.prompts]
    [(4,), (8,)]
    >>> rule(x, y).requires_grad
    False
    """

    updates_weights = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, tokens: int = 50,
                 dimension: int = 500, population: int = 20, step: float = 0.5, after: int = 1,
                 layers: Literal["all", "first"] = "all",
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(0, after=after)
        checks.count(1, tokens=tokens)
        checks.count(2, dimension=dimension)
        checks.count(4, population=population)
        checks.above(0, step=step, advice="try 0.5")
        checks.one_of(["all", "first"], choice_of_layers=layers)
        if example is None:
            raise ValueError("example is needed, since prompts have the shape of what the layers "
                             "take; give an input as example=")
        self.tokens = tokens if token_numbers(example) is not None else 0
        self.after, self.loss = after, loss
        chain = chain_of(self, network, example, loss, apart=False)
        modules = dict(self.network.named_modules())
        # a module that runs twice has one prompt, under its own name
        seen = self._signals([name for name in chain.names if name in modules], example)
        made = [Prompt(name, seen[name], self.tokens, dimension=dimension, population=population,
                       step=step, generator=generator) for name in chain.names if name in seen]
        made = [prompt for prompt in made if self._reaches(prompt, example)]
        if not made:
            raise ValueError("network must have a stage that takes floats and can see a prompt, "
                             f"and none of {chain.names} does; cut it elsewhere with "
                             "stages(network, cuts=...)")
        self.prompts: Iterable[Prompt] = nn.ModuleList(  # type: ignore[assignment]
            made if layers == "all" else made[:1])

    @torch.no_grad()
    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Search one generation for each layer's prompt; return the mean detached loss."""
        means = []
        with evaluating(self.network):
            for prompt in self.prompts:
                before = prompt.weight.data
                try:
                    losses = []
                    for z in prompt.search.ask():
                        prompt.weight.data = prompt.of(z)
                        losses.append(self._loss(x, y))
                finally:
                    prompt.weight.data = before
                found = torch.stack(losses)
                prompt.search.tell(found)
                prompt.weight.copy_(prompt.of(prompt.search.mean))
                means.append(found.mean())
        return torch.stack(means).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the network's scores with the prompts, in eval mode, without a graph."""
        with evaluating(self):
            return self.prompted(x)

    def prompted(self, x: Any) -> Tensor:
        """Return the network's scores with the prompts, in its own mode; gradients may pass."""
        with self._hooked({prompt.stage: prompt.added for prompt in self.prompts}):
            return self._run(x)

    def _loss(self, x: Any, y: Tensor) -> Tensor:
        scores = self.prompted(x)
        return checked(self.loss, scores.to(torch.promote_types(scores.dtype, torch.float32)), y)

    def _run(self, x: Any) -> Tensor:
        """Run the network on `x` with places for the prompts, and take the places out again."""
        if not self.tokens:
            return call(self.network, x)
        numbers = token_numbers(x)
        if numbers is None:
            raise ValueError("x must be token numbers (batch, length) or a mapping with input_ids, "
                             "as the example was; give the same kind of input")
        scores = call(self.network, with_places(x, self.after, self.tokens))
        length = numbers.shape[1] + self.tokens
        if scores.ndim < 3 or scores.shape[1] != length:
            return scores
        return torch.cat([scores[:, :self.after], scores[:, self.after + self.tokens:]], 1)

    @contextmanager
    def _hooked(self, changes: Mapping[str, Callable[[Tensor, int], Tensor]]) -> Iterator[None]:
        """Let what the modules so named take be changed in the body."""
        def hook(change: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
            def changed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (change(args[0], self.after), *args[1:]), kwargs
                name = next(iter(kwargs))
                return args, {**kwargs, name: change(kwargs[name], self.after)}
            return changed

        with ExitStack() as hooks:
            for name, change in changes.items():
                handle = self.network.get_submodule(name).register_forward_pre_hook(
                    hook(change), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _signals(self, names: Sequence[str], example: Any) -> dict[str, Tensor]:
        """Return what each stage takes when the example is run, where that is floats."""
        seen: dict[str, Tensor] = {}

        def noted(name: str) -> Callable[[Tensor, int], Tensor]:
            def note(h: Tensor, _: int) -> Tensor:
                if isinstance(h, Tensor) and h.is_floating_point():
                    seen.setdefault(name, h)
                return h
            return note

        with (evaluating(self.network), rehearsing(self.network),
              self._hooked({name: noted(name) for name in names})):
            self._run(example)
        return seen

    def _reaches(self, prompt: Prompt, example: Any) -> bool:
        with evaluating(self.network), rehearsing(self.network):
            plain = self._run(example)
            with self._hooked({prompt.stage: prompt.added}):
                same = torch.equal(self._run(example), plain)
                prompt.weight.copy_(prompt.of(torch.ones(prompt.search.dimension)))
                reached = same and not torch.equal(self._run(example), plain)
                prompt.weight.zero_()
        return reached


def token_numbers(x: Any) -> Tensor | None:
    """Return the token numbers (batch, length) of an input, None where it has none."""
    numbers = x.get("input_ids") if isinstance(x, Mapping) else x
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.ndim != 2:
        return None
    return numbers


def with_places(x: Any, after: int, tokens: int) -> Any:
    """Return `x` with so many tokens of number 0, not masked, behind the first `after`."""
    if isinstance(x, Mapping):
        if "position_ids" in x:
            raise ValueError("x must not hold position_ids, since prompts shift them; leave them "
                             "to the model")
        shape = x["input_ids"].shape
        grown = {name: _grown(value, after, tokens, float(name == "attention_mask"))
                 for name, value in x.items()
                 if isinstance(value, Tensor) and value.shape == shape}
        return {**x, **grown}
    return _grown(x, after, tokens, 0)


def _grown(values: Tensor, after: int, tokens: int, fill: float) -> Tensor:
    if values.shape[1] < after:
        raise ValueError(f"x must have at least after={after} tokens a row, got "
                         f"{values.shape[1]}; lower after")
    places = torch.full((len(values), tokens), fill, dtype=values.dtype, device=values.device)
    return torch.cat([values[:, :after], places, values[:, after:]], 1)
