from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as losses
from torch.utils._pytree import tree_map

from netwright import checks
from netwright.catalogue.facets import method
from netwright.formal.learners.category import Learner
from netwright.formal.learners.lens import Lens, ParaLens, pair
from netwright.formal.learners.optimisers import Optimiser, ascent
from netwright.formal.learners.pullback import functional, pullback
from netwright.objectives.losses import cross_entropy

__all__ = ["boolean_rate", "exclusive_or", "learning_rate", "loss", "model", "mse", "parametric",
           "softmax_cross_entropy", "supervised"]


@checks.annotated
def parametric(function: Callable[[Any, Any], Any]) -> ParaLens:
    """Return the lens of a function of parameters and input, with its reverse derivative.

    get = f;  put(p, a, b') = ((df/dp)^T b', (df/da)^T b').

    >>> lens = parametric(lambda p, a: a @ p)
    >>> dp, da = lens.put(torch.ones(3, 2), torch.ones(5, 3), torch.ones(5, 2))
    >>> dp.shape, da.shape
    (torch.Size([3, 2]), torch.Size([5, 3]))
    """
    return ParaLens(function, run=lambda p, a: pullback(function, p, a))


@checks.annotated
def model(module: nn.Module) -> tuple[dict[str, Tensor], ParaLens]:
    """Return the trainable parameters of `module` by name, copied, and its lens.

    Raises:
        ValueError: `module` is none, or gathers running statistics as it runs.

    >>> params, lens = model(nn.Linear(4, 3))
    >>> lens.get(params, torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """
    params, function = functional(module)
    return params, parametric(function)


@checks.annotated
def loss(function: Callable[[Any, Any], Tensor]) -> ParaLens:
    """Return a loss of (prediction, label) as a lens whose parameter is the label.

    get: B x B -> L;  put(y, b, l') = ((dL/dy)^T l', (dL/db)^T l').

    >>> lens = loss(losses.mse_loss)
    >>> dy, db = lens.put(torch.zeros(4), torch.ones(4), torch.tensor(1.0))
    >>> db
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return parametric(lambda y, b: function(b, y))


mse = loss(losses.mse_loss)
"""mean (b - y)^2."""

softmax_cross_entropy = loss(cross_entropy)
"""mean -log softmax(b)[y]; y holds class numbers, of which -100 do not count, or probabilities."""

exclusive_or = ParaLens(lambda y, b: y ^ b, lambda y, b, change: (change, change))
"""y + b in Z2: the loss of Boolean circuits, 1 where the prediction is wrong."""


@checks.annotated
def learning_rate(rate: float) -> Lens:
    """Return the lens that ends a network: it answers every loss with -rate.

    get: L -> 1;  put: L -> L', the constant -rate.

    It alone says that the loss is to fall; how large the loss was is never used.

    Raises:
        ValueError: `rate` is not above 0.

    >>> learning_rate(0.1).put(torch.tensor(3.0), ())
    tensor(-0.1000)
    """
    checks.above(0, rate=rate, advice="a loss that is to rise is one with its sign turned")
    return Lens(lambda value: (), lambda value, _: torch.full_like(value, -rate))


boolean_rate = Lens(lambda value: (), lambda value, _: value)
"""What ends a Boolean circuit: the loss itself goes back."""


@method("companion", papers=["003-145"])
def supervised(params: Any, model: ParaLens, *, loss: ParaLens, rate: Lens,
               optimiser: Optimiser | None = None) -> Learner:
    """Return the learner that a model, a loss, a rate and an optimiser make when composed.

    (model >> loss) ends in rate;  optimiser stands before the parameters of model.

    Its parameters are (state of the optimiser, parameters). `optimiser` is plain ascent along what
    `rate` sends back where it is None: gradient descent, since a learning rate sends -rate. The
    request is the input after the same step, a + a': deep dreaming.

    What the papers call a reverse derivative category decides what is computed: smooth maps with
    `learning_rate`, and circuits over Z2 with `exclusive_or`, `boolean_rate` and
    `optimisers.exclusive_or_ascent`, train by this one function.

    Shapes: a and b are what `model` takes and `loss` compares with what it returns.

    Paper: Cruttwell, Gavranović, Ghani, Wilson, Zanasi, 2022, Categorical Foundations of
    Gradient-Based Learning.

    >>> from netwright.formal.learners.optimisers import adam
    >>> params, lens = model(nn.Linear(4, 3))
    >>> net = supervised(params, lens, loss=softmax_cross_entropy, rate=learning_rate(1.0),
    ...                  optimiser=adam(1e-2))
    >>> net.step(torch.randn(2, 4), torch.tensor([0, 2]))(torch.randn(5, 4)).shape
    torch.Size([5, 3])
    """
    chosen = ascent() if optimiser is None else optimiser
    whole = model >> loss

    def put(params: Any, a: Any, b: Any) -> tuple[Any, Any]:
        p = chosen.lens.get(pair("params", params))
        value, back = whole.run((p, b), a)
        (dp, _), da = back(rate.put(value, rate.get(value)))
        wanted = tree_map(lambda value, change: value if change is None else
                          chosen.move(value, change), a, da)
        return chosen.lens.put(params, dp), wanted

    def get(params: Any, a: Any) -> Any:
        with torch.no_grad():
            return model.get(chosen.lens.get(pair("params", params)), a)

    return Learner.of((chosen.init(params), params), ParaLens(get, put))
