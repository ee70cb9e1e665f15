import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from netwright import checks
from netwright.anatomy.replacing import plain_paths
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of
from netwright.reshape.change import decided, reshape
from netwright.runtime.modes import evaluating, rehearsing, same_attributes
from netwright.runtime.padding import holding, read_padding, real_positions, real_rows
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, copied, tensor_of, tensors

__all__ = ["distill"]

Loss = Literal["auto", "squared", "kl"] | Callable[[Tensor, Tensor], Tensor]

HELD_OUT = 5  # one batch, or one sample, of so many is held out
LOOKS = 20  # how often the held-out data are looked at
SLOWER = 3  # what the rate is divided by when they show no gain
ALIKE = 0.5  # the cosine from which on two layers may be a pair


def teacher_of_the_example() -> nn.Module:
    """Return a small network to learn from."""
    torch.manual_seed(3)
    return example_network()


def example_network() -> nn.Module:
    """Return a small network to teach."""
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


@method(
    "reshape",
    place="whole network",
    needs=["calibration data", "training"],
    keeps_function=False,
    search={"learning_rate": (1e-5, 1e-3)},
    variants={"short": {"teacher": teacher_of_the_example(), "steps": 4},
              "outputs alone": {"teacher": teacher_of_the_example(), "steps": 3, "features": 0.0,
                                "loss": "kl"}},
    network=example_network,
    batch=lambda: torch.randn(10, 8),
)
@reshape
def distill(student: nn.Module, teacher: nn.Module, calibration: Any, *, steps: int = 300,
            seconds: float | None = None, learning_rate: float = 1e-4, features: float = 1.0,
            loss: Loss = "auto", temperature: float = 1.0, batch_size: int = 16,
            held_out: Any = None, generator: Generator | None = None) -> nn.Module:
    """Return a copy of `student` that was trained to say what `teacher` says, without labels.

    L = d(student(x), teacher(x)) + features · mean_i ‖s_i − t_i‖² / ‖t_i‖²

    d is the divergence KL(teacher ‖ student) of the softmax for logits, the squared difference
    over the teacher's squares for any other output. s_i and t_i are what numbered parts of the
    two give (the layers of a stack), paired in their order so that they are as alike as can be (a
    cosine above a half): the student may have fewer. Padding counts in neither.

    It is meant for a student that is close already, such as the result of another reshape: all is
    held in eval mode, the rate is low, rises over the first steps and falls to zero at the end.
    Where held-out data show no gain, it goes on from the best state at a third of the rate. The
    state that comes back is the one that was closest to the teacher on held-out data, which may be
    the one that was given. Only parameters that learn are trained; those of packed or frozen parts
    stay.

    Args:
        student: what is trained, a copy of it.
        teacher: what is learnt from; it takes the same inputs.
        calibration: inputs, or batches of them, some hundreds at least; a fifth is held out.
        steps: how many steps of Adam are made at most.
        seconds: without a limit when None; otherwise it stops then, whatever is left of `steps`.
        learning_rate: the highest rate.
        features: how much the layers in between count; 0 leaves them out.
        loss: d: "squared", "kl" or a function of the student's and the teacher's rows; "auto"
            takes "kl" where the model's output has logits, "squared" elsewhere.
        temperature: what logits are divided by in "kl".
        batch_size: how many samples of a batch are taken in a step at most.
        held_out: inputs that tell which state is kept, in place of a fifth of `calibration`.
        generator: draws the order of the data.

    Shapes: outputs of student and teacher alike, (batch, *, classes) or any other.

    Raises:
        NothingToReshape: no parameter of the student learns.
        ValueError: the outputs differ in shape, there are fewer than two samples, the teacher's
            outputs are not finite, or a number is out of range.

    Paper: Hinton, Vinyals, Dean, 2015, Distilling the Knowledge in a Neural Network.

    >>> from netwright.models import gpt
    >>> from netwright.reshape import changes
    >>> from netwright.reshape.pruning import without_sublayers
    >>> teacher, x = gpt(96, context=16, depth=3), torch.randint(96, (32, 16))
    >>> student = without_sublayers(teacher, x, ["2.mlp_out"])
    >>> nearer = distill(student, teacher, x, steps=10, learning_rate=1e-3)
    >>> before, after = changes(nearer)[-1].decision["distance"]
    >>> after < before
    True
    """
    checks.count(0, steps=steps)
    checks.count(1, batch_size=batch_size)
    checks.above(0, optional=True, seconds=seconds)
    checks.above(0, learning_rate=learning_rate, temperature=temperature)
    checks.at_least(0, features=features)
    if not callable(loss):
        checks.one_of(("auto", "squared", "kl"), loss=loss)
    trained = deepcopy(student)
    learning = [p for p in trained.parameters() if p.requires_grad and (
        p.is_floating_point() or p.is_complex())]
    if not learning:
        raise NothingToReshape(f"no parameter of {type(student).__name__} learns; give those that "
                               "are to be trained requires_grad_(True)")
    seen, kept_out = _split(batches_of(calibration), held_out, batch_size)
    with (same_random_state(), torch.enable_grad(), evaluating(trained), evaluating(teacher),
          same_attributes(trained), plain_paths()):
        pair = _Pair(trained, teacher, loss, temperature, kept_out)
        layers = pair.layers(kept_out[0]) if features else {}
        budget = _Budget(steps, seconds)
        best, distances = _train(pair, layers, features, learning, learning_rate, seen, budget,
                                 generator)
    said = [far if math.isfinite(far) else None for far in distances]
    return decided({"distance": said, "steps": budget.made,
                    "layers": [list(names) for names in layers.items()]}, state=best)


@distill.applies
@torch.no_grad()
def _taught(student: nn.Module, decision: Mapping[str, Any],
            state: Mapping[str, Tensor] | None = None) -> nn.Module:
    for name, parameter in student.named_parameters():
        if state is not None and name in state:
            parameter.copy_(state[name])
    return student


class _Budget:
    """Steps and seconds, whichever is used up first."""

    def __init__(self, steps: int, seconds: float | None) -> None:
        self.steps, self.seconds, self.made = steps, seconds, 0
        self.began = time.perf_counter()

    @property
    def used(self) -> float:
        """The share that is used up, 1 at the end."""
        by_time = 0.0 if self.seconds is None else (
            time.perf_counter() - self.began) / self.seconds
        return max(self.made / self.steps if self.steps else 1.0, by_time)


def _train(pair: "_Pair", layers: Mapping[str, str], features: float, learning: Sequence[Tensor],
           rate: float, seen: Sequence[Any], budget: _Budget, generator: Generator | None
           ) -> tuple[dict[str, Tensor], list[float]]:
    """Train the student; return its best state, and its distance before and after."""
    names = {id(p): name for name, p in pair.student.named_parameters()}
    # Numbers of half precision would not move by a step of a low rate.
    masters = [p.detach().float().requires_grad_() if p.dtype in (torch.float16, torch.bfloat16)
               else p for p in learning]
    optimizer = torch.optim.Adam(masters, lr=rate)
    first = least = pair.distance()
    best = {names[id(p)]: p.detach().clone() for p in learning}
    looked, factor = 0, 1.0
    order = _order(seen, generator)
    with Tries("distill", 100) as bar:
        while budget.used < 1:
            used = budget.used
            for group in optimizer.param_groups:
                group["lr"] = rate * factor * min(1.0, 10 * used + 0.1) * (
                    1 + math.cos(math.pi * used)) / 2
            x = next(order)
            for p in learning:
                p.grad = None
            value = pair.loss(x, layers, features)
            value.backward()
            _step(optimizer, learning, masters)
            budget.made += 1
            looks = min(int(budget.used * LOOKS), LOOKS)
            if looks > looked:
                looked, far = looks, pair.distance()
                if far < least:
                    least = far
                    best = {names[id(p)]: p.detach().clone() for p in learning}
                else:
                    factor /= SLOWER
                    for p, master in zip(learning, masters, strict=True):
                        p.data.copy_(best[names[id(p)]])
                        master.data.copy_(p.data)
                    optimizer.state.clear()
            bar.step(f"distance {least:.3g} of {first:.3g}",
                     max(0, min(100, int(100 * budget.used)) - bar.done))
    return best, [first, least]


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, learning: Sequence[Tensor],
          masters: Sequence[Tensor]) -> None:
    """Step on the masters, unless a gradient is not finite, and give them to what learns."""
    grads = [p.grad for p in learning if p.grad is not None]
    if not all(bool(grad.isfinite().all()) for grad in grads):
        return
    for p, master in zip(learning, masters, strict=True):
        if p is not master:
            master.grad = None if p.grad is None else p.grad.float()
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    for p, master in zip(learning, masters, strict=True):
        if p is not master:
            p.copy_(master)


class _Pair:
    """A student and its teacher, and how far they are apart."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Loss, temperature: float,
                 held_out: Sequence[Any]) -> None:
        self.student, self.teacher, self.temperature = student, teacher, temperature
        self.held_out = held_out
        own = (p for p in teacher.parameters() if p.is_floating_point())
        self.dtype = next((p.dtype for p in own), None)
        self.kept = [self.taught(x) for x in held_out]
        first = self.kept[0]
        if not all(bool(t.isfinite().all()) for t in self.kept):
            raise ValueError("teacher must give finite outputs for what is held out, got others; "
                             "check the inputs and its weights")
        with torch.no_grad():
            output = _run(student, held_out[0])
            mine = tensor_of(output)
        if _rows(held_out[0], mine).shape != first.shape:
            raise ValueError(
                f"student must give what the teacher gives, {tuple(first.shape)} in rows, got "
                f"{tuple(_rows(held_out[0], mine).shape)}; give the teacher that it was made from")
        self.measure = self._measure(loss, output)

    def _measure(self, loss: Loss, output: Any) -> Callable[[Tensor, Tensor], Tensor]:
        if callable(loss):
            return loss
        logits = getattr(output, "logits", None)
        problem = getattr(getattr(self.student, "config", None), "problem_type", None)
        soft = loss == "kl" or (loss == "auto" and isinstance(logits, Tensor)
                                and logits.shape[-1] > 1 and problem != "regression")
        return self._divergence if soft else _relative

    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        p, q = (t.float() / self.temperature for t in (theirs, mine))
        return nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean",
                                    log_target=True) * self.temperature**2

    def taught(self, x: Any) -> Tensor:
        """Return what the teacher says, one row for each position that is no padding."""
        with torch.no_grad(), rehearsing(self.teacher):
            return _rows(x, tensor_of(_run(self.teacher, self._theirs(x)))).clone()

    def _theirs(self, x: Any) -> Any:
        """Return an input in the teacher's precision."""
        return tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.is_floating_point()
                             and self.dtype is not None else t,
                             dict(x) if isinstance(x, Mapping) else x)

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the student is from the teacher on what is held out."""
        total = rows = 0.0
        for x, theirs in zip(self.held_out, self.kept, strict=True):
            mine = _rows(x, tensor_of(_run(self.student, x)))
            value = float(self.measure(mine, theirs.to(mine.dtype)))
            total, rows = total + len(theirs) * value, rows + len(theirs)
        far = total / max(rows, 1)
        return far if math.isfinite(far) else math.inf

    def loss(self, x: Any, layers: Mapping[str, str], features: float) -> Tensor:
        """Return what a step makes smaller."""
        if not layers:
            return self.measure(*_alike(_rows(x, tensor_of(_run(self.student, x))),
                                        self.taught(x)))
        with torch.no_grad(), rehearsing(self.teacher):
            theirs, said = _watched(self.teacher, self._theirs(x), set(layers.values()))
        mine, saying = _watched(self.student, x, set(layers))
        apart = torch.stack([_relative(*_alike(_rows(x, mine[a]), _rows(x, theirs[b])))
                             for a, b in layers.items()]).mean()
        return self.measure(*_alike(_rows(x, saying), _rows(x, said))) + features * apart

    @torch.no_grad()
    def layers(self, x: Any) -> dict[str, str]:
        """Return the student's layers, each with the teacher's that it is most like, in order."""
        with rehearsing(self.teacher), rehearsing(self.student):
            theirs, _ = _watched(self.teacher, self._theirs(x), _numbered(self.teacher))
            mine, _ = _watched(self.student, x, _numbered(self.student))
        likeness = [[_cosine(_rows(x, a), _rows(x, b)) for b in theirs.values()]
                    for a in mine.values()]
        return {list(mine)[i]: list(theirs)[j] for i, j in _aligned(likeness)}


def _aligned(likeness: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Return pairs in the order of both rows that are as alike as can be in sum.

    >>> _aligned([[0.9, 0.2, 0.1], [0.1, 0.3, 0.8]])
    [(0, 0), (1, 2)]
    """
    rows, columns = len(likeness), len(likeness[0]) if likeness else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j],
                                     best[i][j] + max(likeness[i][j] - ALIKE, 0.0))
    pairs: list[tuple[int, int]] = []
    i, j = rows, columns
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def _numbered(model: nn.Module) -> set[str]:
    """Return the outermost parts whose name is a number, as those of a stack of layers."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()]
    return {name for name in found if not any(
        part.isdigit() for part in name.split(".")[:-1])}


def _watched(model: nn.Module, x: Any, names: set[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Return what parts give, in the order in which they run, and what the model gives."""
    gave: dict[str, Tensor] = {}

    def seeing(name: str) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            first = next((t for t in tensors(output) if t.is_floating_point() and t.ndim > 1),
                         None)
            if first is not None:
                gave[name] = first
        return see
    handles = [model.get_submodule(name).register_forward_hook(seeing(name)) for name in names]
    try:
        return gave, tensor_of(_run(model, x))
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, x: Any) -> Any:
    handles = read_padding(model)
    try:
        return apply(model, copied(x))
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: Any, output: Tensor) -> Tensor:
    """Return the vectors of an output that are no padding, one a row."""
    if output.ndim < 2:
        return output.reshape(-1, 1)
    with holding(real_positions(x) if isinstance(x, Mapping) else None):
        return real_rows(output)


def _alike(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    return mine, theirs.to(mine.device, mine.dtype)


def _relative(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the squared difference over the teacher's squares."""
    mine, theirs = mine.float(), theirs.float()
    least = torch.finfo(torch.float32).tiny
    return (mine - theirs).square().sum() / theirs.square().sum().clamp_min(least)


def _cosine(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return -1.0
    a, b = (t.double() - t.double().mean(0) for t in (mine, theirs.to(mine.device)))
    size = a.norm() * b.norm()
    return float((a * b).sum() / size) if float(size) > 0 else -1.0


def _split(batches: Sequence[Any], held_out: Any, size: int) -> tuple[list[Any], list[Any]]:
    """Return small batches to train on, and those that are held out."""
    pieces = [piece for batch in batches for piece in _pieces(batch, size)]
    if held_out is not None:
        try:
            kept_out = batches_of(held_out)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("calibration", "held_out", 1)) from error
        return pieces, [piece for batch in kept_out for piece in _pieces(batch, size)]
    if len(pieces) == 1:
        pieces = _pieces(pieces[0], max(1, _samples(pieces[0]) // 2))
    if len(pieces) < 2:
        raise ValueError("calibration must hold at least two samples, one of them to tell which "
                         "state is kept, got one; a few hundred are a good number")
    count = max(1, len(pieces) // HELD_OUT)
    return pieces[:-count], pieces[-count:]


def _pieces(batch: Any, size: int) -> list[Any]:
    """Return a batch cut into pieces of `size` samples, where its samples can be told apart."""
    count = _samples(batch)
    if count <= size:
        return [batch]
    plain = dict(batch) if isinstance(batch, Mapping) else batch

    def piece(first: int) -> Any:
        return tree_map_only(Tensor, lambda t: t[first:first + size], plain)
    return [piece(i) for i in range(0, count, size)]


def _samples(batch: Any) -> int:
    """Return how many samples a batch has, 1 where that cannot be told."""
    sizes = {len(t) if t.ndim else 0 for t in tree_leaves(
        dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(t, Tensor)}
    return max(sizes) if len(sizes) == 1 and max(sizes) else 1


def _order(seen: Sequence[Any], generator: Generator | None) -> Iterator[Any]:
    """Yield batches without end, in another order each time."""
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    while True:
        for i in torch.randperm(len(seen), generator=draws, device=draws.device).tolist():
            yield seen[i]
