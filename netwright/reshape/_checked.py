"""The result of a reshape is run, beside the model that it was made from, before it is returned."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netwright.anatomy.residual_blocks import example_of
from netwright.errors import BrokenReshape, CannotStage
from netwright.reshape._calibration import few
from netwright.runtime.modes import evaluating, rehearsing, same_attributes, training
from netwright.signals import apply, copied, tensor_of, tensors


class Remembered:
    """What is gone through as `batches` are; it keeps the first of them.

    >>> batches = Remembered(iter([1, 2]))
    >>> list(batches), batches.first
    ([1, 2], 1)
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.first: Any = None

    def __iter__(self) -> Iterator[Any]:
        for k, batch in enumerate(self.batches):
            if k == 0:
                self.first = batch
            yield batch

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def example_for(model: nn.Module, given: Mapping[str, Any]) -> Any:
    """Return what `model` can be run on, of what a reshape was given; None where there is none."""
    for name in ("example", "calibration"):
        x = given.get(name)
        if isinstance(x, Remembered):
            x = x.first
        elif isinstance(x, list) and name == "calibration":
            x = x[0] if x else None
        if isinstance(x, list) and x:  # how loaders hand over inputs with their targets
            x = x[0]
        if isinstance(x, Mapping):
            x = {key: value for key, value in x.items() if key != "labels"}
        if x is not None:
            return x
    try:
        return example_of(model)
    except ValueError:
        return None


def check_result(name: str, model: nn.Module, result: nn.Module, x: Any, *,
                 kept: bool) -> None:
    """Raise BrokenReshape unless `result` does on `x` what a changed `model` must.

    It runs in eval and in train mode wherever the model does, and gives finite outputs of the
    model's shapes, in eval mode the model's outputs where they are `kept`. Where it generates, two
    steps with a cache give what a full pass gives. Of a batch the first rows are taken. Modes,
    buffers and the random state are put back.
    """
    x, expected = _expected(model, x)
    if expected is None:
        return
    for mode, held in (("eval", evaluating), ("train", training)):
        try:
            got = _outputs(result, x, held)
        except Exception as error:  # whatever the network's own code raises
            if mode == "eval" or _runs(model, x, held):
                raise BrokenReshape(
                    f"{name} made a model that does not run in {mode} mode on the example: "
                    f"{type(error).__name__}: {error}; {_ADVICE}") from error
            continue
        _compare(name, mode, got, expected, kept=kept and mode == "eval")
    _check_generation(name, model, result, x)


_ADVICE = ("the model that was given is as it was; leave this network's unusual part out (see "
           "layers=, where there is one), or give check=False to have the result all the same")


def _expected(model: nn.Module, x: Any) -> tuple[Any, list[Tensor] | None]:
    """Return an input and what `model` gives for it; None where it does not run."""
    for given in (few(x), x):
        try:
            return given, _outputs(model, given, evaluating)
        except Exception:  # the example is not one, and whoever needed it has said so
            continue
    return x, None


def _outputs(model: nn.Module, x: Any, held: Callable[[nn.Module], Any]) -> list[Tensor]:
    with held(model), rehearsing(model), same_attributes(model):
        output = apply(model, copied(x))
    try:
        return [tensor_of(output)]
    except CannotStage:  # several outputs, none of which is known to be the one that is meant
        return tensors(output)


def _runs(model: nn.Module, x: Any, held: Callable[[nn.Module], Any]) -> bool:
    try:
        _outputs(model, x, held)
    except Exception:  # in train mode some networks need more than an example holds
        return False
    return True


def _compare(name: str, mode: str, got: list[Tensor], expected: list[Tensor], *,
             kept: bool) -> None:
    shapes = [[tuple(t.shape) for t in some] for some in (got, expected)]
    if shapes[0] != shapes[1]:
        raise BrokenReshape(f"{name} made a model whose outputs in {mode} mode are of shape "
                            f"{shapes[0]} where the model's are {shapes[1]}; {_ADVICE}")
    for one, other in zip(got, expected, strict=True):
        if not one.isfinite().all() and other.isfinite().all():
            raise BrokenReshape(f"{name} made a model whose outputs in {mode} mode are nan or "
                                f"infinite on the example; {_ADVICE}")
        if kept and (moved := _apart(one, other)) > _rounding(other):
            raise BrokenReshape(f"{name} keeps the function, but the outputs moved by {moved:.1e} "
                                f"of the largest; {_ADVICE}")


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    if not other.is_floating_point() or not other.numel():
        return 0.0
    a, b = one.double().nan_to_num(), other.double().nan_to_num()
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-12))


def _rounding(like: Tensor) -> float:
    """Return a difference that is more than rounding makes."""
    return float(torch.finfo(like.dtype).eps ** 0.5) if like.is_floating_point() else 0.0


def _check_generation(name: str, model: Any, result: Any, x: Any) -> None:
    if not (callable(getattr(result, "can_generate", None)) and result.can_generate()):
        return
    prompt = {key: value for key, value in (x.items() if isinstance(x, Mapping) else [
        (result.main_input_name, x)]) if isinstance(value, Tensor)}
    prompt = _without_padding(prompt)
    try:
        moved, most = _cache_moves(result, prompt)
        said = f"with a cache move the logits by {moved:.1e} of the largest" * (moved > most)
    except Exception as error:  # whatever the network's own code raises
        moved, most, said = 1.0, 0.0, f"raise {type(error).__name__}: {error}"
    if moved > most and _generates(model, prompt):
        raise BrokenReshape(f"{name} made a model whose generate() is wrong: two steps {said}; "
                            f"{_ADVICE}")


def _without_padding(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the first row's real tokens alone, where there is padding.

    What `generate` does about padding, such as other positions, is not what a full pass does.
    """
    mask = prompt.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.bool().all() or not mask[0].any():
        return prompt
    real = mask[0].bool()
    return {key: t[:1, real] if t.shape[:2] == mask.shape else t[:1] for key, t in prompt.items()}


def _generates(model: Any, prompt: Mapping[str, Tensor]) -> bool:
    try:
        moved, most = _cache_moves(model, prompt)
    except Exception:  # a model of another kind than generate() takes with this prompt
        return False
    return moved <= most


def _cache_moves(model: Any, prompt: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return how far two steps with a cache move the logits of a full pass, and how far they may.

    With numbers of half precision a router may choose other experts, so that any distance may be.
    """
    import transformers
    own = model.generation_config
    settings = transformers.GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=True, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id, decoder_start_token_id=own.decoder_start_token_id)
    given = {key: value for key, value in prompt.items() if not key.startswith("decoder_")}
    if "input_ids" in given and "attention_mask" in inspect.signature(model.forward).parameters:
        # Otherwise tokens that happen to be the padding's would be taken for padding.
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    with evaluating(model), rehearsing(model), same_attributes(model):
        written = model.generate(**copied(given), generation_config=settings)
        tokens = written.sequences[:, :-1]
        if model.config.is_encoder_decoder:
            full = model(**copied(given), decoder_input_ids=tokens, use_cache=False)
        else:
            mask = given.get("attention_mask")
            masks = {} if mask is None else {"attention_mask": nn.functional.pad(mask, (0, 1),
                                                                                 value=1)}
            full = model(input_ids=tokens, use_cache=False, **masks)
    steps = torch.stack(written.logits, 1)
    moved = _apart(steps, full.logits[:, -steps.shape[1]:])
    coarse = torch.finfo(full.logits.dtype).eps > 1e-5
    return moved, float("inf") if coarse else 10 * _rounding(full.logits)
