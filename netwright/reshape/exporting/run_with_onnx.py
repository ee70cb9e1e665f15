import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.replacing import plain_paths
from netwright.catalogue.facets import method
from netwright.errors import MissingExtra, NothingToReshape
from netwright.reshape.change import decided, reshape
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import apply, tensors

__all__ = ["run_with_onnx"]

MOST = 2**31 - 2**20  # bytes that one file of ONNX's can hold


@method(
    "execution",
    place="whole network",
    saves=["inference time"],
    keeps_function=False,
    search={"weights": ["float", "int8"]},
    variants={"as it is": {}},
    network=lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)),
    batch=lambda: torch.randn(5, 8),
)
@reshape
@torch.no_grad()
def run_with_onnx(model: nn.Module, example: Any, *, weights: str = "float") -> nn.Module:
    """Return a module that runs the model's exported graph in ONNX Runtime.

    y = graph(x), the graph of the model in eval mode, which ONNX Runtime fuses and runs.

    It is for inference: nothing in it learns, whatever mode it is in, and it generates only by
    full passes. It takes what the model takes on the CPU, by place or by name, and gives what the
    model gave (without caches). The first axis of what it takes, and the second one of numbers of
    tokens, may have any length where the model's export allows it; elsewhere the example's.

    With `weights="int8"` the matrices of linear layers are eight-bit integers with a scale for
    each output, and what they take is rounded to eight bits as it comes, with a scale for each
    tensor; both make the answer differ.

    The graph is kept as a buffer, so that the module is copied, pickled, saved by
    `netwright.save` and loaded as any other; a session is opened when it first runs.

    Args:
        model: any module that `torch.export` reads.
        example: what it takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        weights: "float", as they are, or "int8".

    Raises:
        MissingExtra: onnx, onnxscript and onnxruntime are not installed.
        NothingToReshape: the model has no weights, cannot be exported, or is one already.
        UnknownName: `weights` is none of the two.

    >>> model, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(5, 8)
    >>> fast = run_with_onnx(model, x)
    >>> torch.allclose(fast(x), model(x), atol=1e-5), fast(torch.randn(2, 8)).shape
    (True, torch.Size([2, 3]))
    """
    checks.one_of(("float", "int8"), weights=weights)
    if isinstance(model, InOnnx):
        raise NothingToReshape("model runs in ONNX Runtime already; export the one that it was "
                               "made from")
    if not any(True for _ in model.parameters()):
        raise NothingToReshape(f"{type(model).__name__} has no weights, so that there is nothing "
                               "to run faster")
    _needed()
    plain = deepcopy(model)
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks):
        hooks.clear()  # those of the whole stay around the graph
    with evaluating(plain), rehearsing(plain), plain_paths():
        try:
            output = apply(plain, example)
        except Exception as error:  # whatever the model says of what it cannot take
            raise ValueError("example must be what the model takes, got a "
                             f"{type(example).__name__}, on which {type(model).__name__} fails: "
                             f"{error}") from error
        graph = _exported(plain, example, output)
    if weights == "int8":
        graph = _in_int8(graph)
    if len(graph) > MOST:
        raise NothingToReshape(f"the graph of {type(model).__name__} has {len(graph)} bytes, and "
                               "one of ONNX's files holds 2 GB; make the model smaller first")
    data = torch.from_numpy(numpy.frombuffer(graph, numpy.uint8).copy())
    return decided({"bytes": len(graph), "names": _names(example), "output": _said(output)},
                   graph=data)


@run_with_onnx.applies
def _runs(model: nn.Module, decision: Mapping[str, Any], graph: Tensor | None = None) -> nn.Module:
    data = torch.zeros(decision["bytes"], dtype=torch.uint8) if graph is None else graph
    return InOnnx(model, data, decision["names"], decision["output"])


class InOnnx(nn.Module):
    """A graph that ONNX Runtime runs, in the place of the model that it is of."""

    graph: Tensor

    def __init__(self, model: Any, graph: Tensor, names: list[str] | None,
                 output: Mapping[str, Any]) -> None:
        super().__init__()
        self.names, self.output = names, output
        self._session: Any = None
        self._of: tuple[int, int] = (0, 0)
        for name, buffer in model._buffers.items():
            if buffer is not None:
                self.register_buffer(name, buffer,
                                     persistent=name not in model._non_persistent_buffers_set)
        self._forward_hooks.update(model._forward_hooks)
        self._forward_pre_hooks.update(model._forward_pre_hooks)
        self.register_buffer("graph", graph)
        if hasattr(model, "config"):
            self.config = model.config
        self.train(model.training)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the graph gives."""
        session = self._open()
        given = tensors([*args, *(kwargs[name] for name in self.names or kwargs
                                  if name in kwargs)])
        inputs = session.get_inputs()
        if len(given) != len(inputs):
            raise ValueError(f"the graph takes {self.names or len(inputs)}, as the example had "
                             f"that it was exported with, got {len(given)} tensors; give those, or "
                             "export it with another example")
        held = {said.name: t.detach().cpu().contiguous().numpy()
                for said, t in zip(inputs, given, strict=True)}
        gave = [torch.from_numpy(numpy.asarray(y)) for y in session.run(None, held)]
        return _restored(self.output, gave)

    def _open(self) -> Any:
        """Return the session of the graph as it is now."""
        now = (self.graph.data_ptr(), self.graph._version)
        if self._session is None or self._of != now:
            _needed()
            import onnxruntime
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                self.graph.cpu().numpy().tobytes(), options, providers=["CPUExecutionProvider"])
            self._of = now
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # a session is of one process


def _needed() -> None:
    try:
        import onnx  # noqa: F401 - the exporter imports it
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX Runtime runs models by onnx, onnxscript and onnxruntime, which "
                           f"are not all installed ({error}); pip install 'netwright[onnx]'"
                           ) from error


def _exported(model: nn.Module, example: Any, output: Any) -> bytes:
    """Return the graph of a model, its first axes free where the export allows it."""
    args = tuple(example.values()) if isinstance(example, Mapping) else (
        tuple(example) if isinstance(example, (tuple, list)) else (example,))
    wrapped = _Tensors(model, _names(example))
    errors = []
    for shapes in ({"args": tuple(_axes(t) for t in args)}, None):
        try:
            return _program(wrapped, args, shapes)
        except Exception as error:  # whatever the exporter raises at a model that it cannot read
            errors.append(error)
    said = " ".join(str(errors[-1]).split())[:300]
    raise NothingToReshape(f"{type(model).__name__} cannot be exported to ONNX: "
                           f"{type(errors[-1]).__name__}: {said}") from errors[-1]


class _Tensors(nn.Module):
    """A model that takes its arguments in a row and gives a tuple of tensors, without caches."""

    def __init__(self, model: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """Return the tensors."""
        given = args if self.names is None else dict(zip(self.names, args, strict=True))
        return tuple(_parts(apply(self.model, given)).values())


def _parts(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output by their names, or by their numbers."""
    if isinstance(output, Tensor):
        return {"": output}
    entries = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {str(name): value for name, value in entries if isinstance(value, Tensor)}


def _said(output: Any) -> dict[str, Any]:
    """Return as plain data how the outputs of a graph are put together."""
    kind = "tensor" if isinstance(output, Tensor) else (
        "mapping" if isinstance(output, Mapping) else "tuple")
    named = type(output).__module__ == "transformers.modeling_outputs"
    return {"kind": type(output).__name__ if named else kind, "names": list(_parts(output))}


def _restored(said: Mapping[str, Any], gave: list[Tensor]) -> Any:
    if said["kind"] == "tensor":
        return gave[0]
    if said["kind"] == "tuple":
        return tuple(gave)
    made = dict(zip(said["names"], gave, strict=True))
    if said["kind"] == "mapping":
        return made
    from transformers import modeling_outputs
    return getattr(modeling_outputs, said["kind"])(**made)


def _names(example: Any) -> list[str] | None:
    return list(example) if isinstance(example, Mapping) else None


def _axes(given: Any) -> Any:
    """Return which axes are free: samples, and places of tokens."""
    if not isinstance(given, Tensor) or not given.ndim:
        return None
    free = 2 if given.ndim == 2 and not given.is_floating_point() else 1
    return dict.fromkeys(range(free), torch.export.Dim.DYNAMIC)


def _program(model: nn.Module, args: tuple[Any, ...], shapes: Any) -> bytes:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        made = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert made is not None
        path = Path(folder) / "model.onnx"
        made.save(str(path), external_data=False)
        return path.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter says of libraries that are not there and of its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _in_int8(graph: bytes) -> bytes:
    """Return a graph whose matrices are eight-bit, with a scale for each of their outputs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(graph)
        quantize_dynamic(before, after, per_channel=True, weight_type=QuantType.QInt8)
        return after.read_bytes()
