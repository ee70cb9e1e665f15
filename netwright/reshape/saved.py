"""Changed models on disk: safetensors and JSON, nothing pickled, whole after a kill."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from netwright.catalogue.facets import method
from netwright.errors import CorruptCheckpoint, UnknownName
from netwright.reshape._naming import unnamed
from netwright.reshape.change import Reshaped, changes, history, named
from netwright.runtime.files import digest as _digest
from netwright.runtime.files import flush as _flush
from netwright.runtime.files import text_digest as _text_digest
from netwright.runtime.packing import read_tensors, write_packed
from netwright.runtime.random_state import same_random_state
from netwright.runtime.version import __version__

__all__ = ["load", "save"]

FORMAT = 1
CHANGES, WEIGHTS, BUFFERS = "changes.json", "model.safetensors", "buffers.safetensors"
SHARD = 5 * 2**30  # bytes; a file of weights holds no more, unless one tensor does
_TOKENIZER = "tokenizer.json"
_EXTRA = "_extra_state"  # the name that state_dict gives it
_PARTIAL, _NEXT = ".netwright.partial", ".netwright.next"
_REFUSED = "read-this-folder-by-netwright.load.safetensors"


@method("companion")
@torch.no_grad()
def save(model: nn.Module, folder: str | Path, *, base: str | Path | None = None,
         compress: bool = False) -> None:
    """Write a model to `folder`, with all that `load` needs to build it again where it was changed.

    `model.safetensors` holds the weights (in several files where they are large; tied weights
    once), `changes.json` what the model was and each change with its decision. A Hugging Face
    model has its `config.json` and generation config beside them. Where its own class can express
    what was changed, as a smaller number of layers, plain `from_pretrained` loads the folder too;
    where it cannot, `from_pretrained` refuses it. A tokenizer that a change gave it goes along.

    With `base`, a folder of the model before it was changed (or before the last of its changes),
    only what differs from that is written: adapters, for instance.

    With `compress` zeros of weights are not stored, and exponents in as few bits as they need:
    half the weights zero makes float32 files less than half as large, and bfloat16 weights take
    two thirds. `load` gives the same numbers to the bit; nothing else can read such a folder.

    Kept are parameters and buffers with their dtype and ties, which parameters learn, and each
    module's mode. Hooks and other functions are not, nor is what was set by hand on a changed
    model's modules, such as a router's `k`.

    A kill at any moment leaves what was in the folder, or the new model, whole. Other files in
    the folder stay.

    Args:
        model: what is kept.
        folder: where; it is made where it is not there.
        base: a folder of the model before its changes, see above.
        compress: whether files are made smaller, see above.

    Raises:
        ValueError: a reshape was given something without a public name, a part of the model was
            reshaped by itself, or the model is compiled or holds no weights.
        CorruptCheckpoint: `base` is damaged, or belongs to another model.

    >>> from tempfile import mkdtemp
    >>> from netwright.models import gpt
    >>> from netwright.reshape import prune_sublayers
    >>> x, folder = torch.zeros(1, 16, dtype=torch.long), mkdtemp()
    >>> smaller = prune_sublayers(gpt(96, context=16), x, remove=2)
    >>> save(smaller, folder)
    >>> torch.equal(load(folder, gpt(96, context=16))(x), smaller(x))
    True
    """
    _check_can_be_saved(model)
    folder = Path(folder)
    stored = _Stored.of(model)
    content: dict[str, Any] = {
        "format": FORMAT, "netwright": __version__, "original": dict(history(model).origin),
        "changes": [vars(record) for record in changes(model)],
        "base": None, "modes": _modes(model), "frozen": sorted(
            name for name, p in model.named_parameters() if not p.requires_grad),
        "tied": stored.tied, "strides": stored.strides}
    if base is not None:
        content["base"] = _take_away(stored, Path(base), folder)

    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_pretrained(model, partial, expressible=base is None and not compress
                      and _expressible(model))
    _write_tokenizer(model, partial)
    content["files"] = stored.write(partial, compress)
    content["written"] = sorted(path.name for path in partial.iterdir())
    content["sha256"] = _text_digest(content)
    (partial / CHANGES).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)
    os.replace(partial, folder / _NEXT)  # from here on the new model is the one that is there
    _flush(folder)
    _recover(folder)


@method("companion")
@torch.no_grad()
def load(folder: str | Path, network: nn.Module | None = None, *,
         base: str | Path | None = None) -> nn.Module:
    """Return the model that `save` wrote, its changes carried out again, its outputs the same.

    A Hugging Face model is built from what the folder says.

    Args:
        folder: what `save` wrote to.
        network: for any other model, a fresh one of the architecture that was reshaped, with
            whatever weights; it is left as it is.
        base: where the folder is now that `save` was given as `base`.

    Raises:
        CorruptCheckpoint: a file is missing, damaged, truncated or of something else.
        ValueError: `network` is needed, or is not of the architecture that was reshaped.
        UnknownName: a change is by a reshape that is not known here.
    """
    folder = Path(folder)
    _recover(folder)
    content = _content(folder)
    records = [Reshaped(**record) for record in content["changes"]]
    tensors = _read(folder, content["files"]) | _given(content, folder, base)
    model = _start(folder, content["original"], network)
    _check_class(model, content, folder)
    for record in records[len(changes(model)):]:
        model = _again(model, record)
    _fill(model, tensors, content, folder)
    if any("tokenizer" in name for name in content["written"]):
        _read_tokenizer(model, folder)
    return model


def _again(model: nn.Module, record: Reshaped) -> nn.Module:
    with same_random_state():
        torch.manual_seed(0)  # so that what is drawn, and then loaded, is the same each time
        return named(record.name).carry_out(model, record.decision, record.arguments, {})


def _check_can_be_saved(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError("model was compiled by torch.compile, which hides its parts; save the "
                         "module that was compiled")
    for name, module in model.named_modules():
        if name and changes(module):
            raise ValueError(f"model holds {name!r}, which was reshaped by itself; reshape the "
                             "whole model, or save that part")
    for name, state in _extra_states(model):
        if not isinstance(state, Tensor):
            raise ValueError(f"model holds {name!r}, the extra state of a module, which is no "
                             "tensor and has no place in the files; save the model's state_dict")
    for record in changes(model):
        try:
            named(record.name)
        except UnknownName as error:
            raise ValueError(f"model was changed by {record.name}, which cannot be found by its "
                             "name; define it at the top of a module") from error
        for what in unnamed(record.decision):
            asked = [name for name, value in record.arguments.items() if any(unnamed(value))]
            raise ValueError(
                f"{record.name} was given {' and '.join(asked) or 'an argument'} that made {what}; "
                "only what has a public name can be built again: give it a block of "
                "netwright.blocks or torch.nn, or a partial or lambda that makes one")


class _Stored(NamedTuple):
    """The tensors of a model by name, each once, and what those are that go by a second name."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]  # those that state_dict leaves out
    tied: dict[str, str]
    strides: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module) -> "_Stored":
        stored = cls({}, {}, {}, {})
        first: dict[int, str] = {}
        stored.buffers.update(_extra_states(model))
        for name, tensor, persistent in _tensors(model):
            if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(f"model must hold plain tensors, but {name} is on the device "
                                 f"{tensor.device} with layout {tensor.layout}")
            if id(tensor) in first:
                stored.tied[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            (stored.weights if persistent else stored.buffers)[name] = tensor
            if not tensor.is_contiguous():
                stored.strides[name] = list(tensor.stride())
        return stored

    def write(self, folder: Path, compress: bool) -> dict[str, str]:
        """Write the files of tensors; return their names with their digests."""
        files = {}
        shards = _shards(self.weights)
        names = [WEIGHTS] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            files[name] = _write(folder / name, {key: self.weights[key] for key in shard},
                                 compress)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in self.weights.values())},
                     "weight_map": {key: name for name, shard in zip(names, shards, strict=True)
                                    for key in shard}}
            (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=1))
        if self.buffers:
            files[BUFFERS] = _write(folder / BUFFERS, self.buffers, compress)
        return files


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield every parameter and buffer by every name it has, and whether `state_dict` has it."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield prefix + name, buffer, name not in module._non_persistent_buffers_set


def _extra_states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what modules add to a `state_dict` besides parameters and buffers, as a count."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{_EXTRA}".lstrip("."), module.get_extra_state()


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(path: Path, tensors: Mapping[str, Tensor], compress: bool) -> str:
    from safetensors.torch import save_file
    if compress:
        write_packed(tensors, path)
        return _digest(path)
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if flat.untyped_storage().data_ptr() in storages:  # safetensors refuses two views of one
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        held[name] = flat
    save_file(held, path, metadata={"format": "pt"})
    return _digest(path)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the files of tensors that `save` would write; the model may be meta."""
    weights: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = dict(_extra_states(model))
    seen: set[int] = set()
    for name, tensor, persistent in _tensors(model):
        if id(tensor) not in seen:
            (weights if persistent else buffers)[name] = tensor
            seen.add(id(tensor))
    files = [{name: weights[name] for name in shard} for shard in _shards(weights)]
    return sum(map(_file_bytes, [*files, *([buffers] if buffers else [])]))


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of a file of safetensors: a length, a header of JSON, the numbers."""
    from safetensors.torch import _TYPES
    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _modes(model: nn.Module) -> dict[str, Any]:
    """Return the model's mode, and the modules that are in the other one."""
    return {"training": model.training, "others": [
        name for name, module in model.named_modules() if module.training != model.training]}


# Hugging Face's own files.

def _write_pretrained(model: Any, folder: Path, *, expressible: bool) -> None:
    origin = history(model).origin
    if origin["config"] is None:
        return
    kind = origin["class"].rpartition(".")[2]
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), None)
    if expressible:
        config = deepcopy(model.config)
        config.architectures = [kind]
        config.dtype = dtype
        config.save_pretrained(folder)
    else:
        note = {"load": "netwright.load(folder)", "version": __version__,
                "changes": [record.name for record in changes(model)],
                "shapes": _other_shapes(model, origin["config"]), "removed": {
                    name: units for record in changes(model)
                    for name, units in _removed(record.decision).items()}}
        # The name of a file that is not there: from_pretrained refuses, and says this name.
        text = json.dumps(origin["config"] | {"architectures": [kind], "dtype": dtype,
                                              "netwright": note, "transformers_weights": _REFUSED},
                          indent=2, sort_keys=True)
        (folder / "config.json").write_text(text, encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _write_tokenizer(model: Any, folder: Path) -> None:
    """Write the tokenizer that belongs to a model, where a change gave it one."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "to_str"):
        tokenizer.save(str(folder / _TOKENIZER))


def _read_tokenizer(model: Any, folder: Path) -> None:
    """Give a model the tokenizer that was written beside it."""
    if (folder / "tokenizer_config.json").exists():
        import transformers
        model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    elif (folder / _TOKENIZER).exists():
        import tokenizers
        model.tokenizer = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))


def _other_shapes(model: Any, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of the tensors that are otherwise in what `config` alone makes."""
    kind = type(model)
    if history(model).origin["class"] != f"{kind.__module__}.{kind.__qualname__}":
        return {}  # what stands for the model has no tensors of its
    with torch.device("meta"):
        first = type(model)(type(model.config).from_dict(dict(config)))
    made = {name: tensor.shape for name, tensor, _ in _tensors(first)}
    return {name: list(tensor.shape) for name, tensor, _ in _tensors(model)
            if made.get(name) != tensor.shape}


def _removed(decision: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the units that a decision takes out, by the names of their groups."""
    removed = decision.get("removed")
    return removed if isinstance(removed, Mapping) else {}


def _expressible(model: Any) -> bool:
    """Return whether a model's class makes all of it from its config."""
    if history(model).origin["config"] is None:
        return False
    try:
        with torch.device("meta"):
            made = type(model)(deepcopy(model.config))
    except Exception:  # whatever a class raises at a config that it was not written for
        return False
    return _anatomy(made) == _anatomy(model)


def _anatomy(model: nn.Module) -> dict[str, Any]:
    """Return what every module is: its class, its settings, and its tensors' shapes."""
    def settings(module: nn.Module) -> dict[str, Any]:
        return {key: value for key, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None)))
                and not key.startswith("_") and key not in ("training", "gradient_checkpointing")}
    found: dict[str, Any] = {name: (type(module), settings(module))
                             for name, module in model.named_modules()}
    found[""] = type(model)
    return found | {name: tuple(tensor.shape) for name, tensor, _ in _tensors(model)}


def _start(folder: Path, origin: Mapping[str, Any], network: nn.Module | None) -> nn.Module:
    """Return a model as it was before it was changed, with whatever weights."""
    if network is not None:
        return deepcopy(network)
    if origin["config"] is None:
        raise ValueError(
            f"network must be given for {folder}, whose model was a {origin['class']}: build one "
            "of the same architecture, with any weights, and pass it as network=")
    return _pretrained(origin, folder)


def _pretrained(origin: Mapping[str, Any], folder: Path) -> nn.Module:
    """Return a model of a class of transformers, by its config."""
    import transformers
    kind: Any = getattr(transformers, origin["class"].rpartition(".")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"network must be given for {folder}: its {origin['class']} is no class "
                         "of transformers; build one and pass it as network=")
    config: Any = kind.config_class
    config = config.from_dict(origin["config"])
    if origin["attention"] is not None:
        config._attn_implementation = origin["attention"]
    with same_random_state():
        return cast(nn.Module, kind(config))


# Bases.

def _take_away(stored: "_Stored", base: Path, folder: Path) -> dict[str, Any]:
    """Take from `stored` what the weights in `base` hold too; return what says where it is.

    Tensors are told by what they hold, whatever they are called and whichever way they lie.
    """
    if base.resolve() == folder.resolve():
        raise ValueError(f"base must be another folder than {str(folder)!r}, which is written")
    there = {_held(tensor): name for name, tensor in _weights(base).items()}
    taken: dict[str, list[Any]] = {}
    for tensors in (stored.weights, stored.buffers):
        for name, tensor in list(tensors.items()):
            ways = [tensor, tensor.T] if tensor.ndim == 2 else [tensor]
            sources = [there.get(_held(way)) for way in ways]
            if any(sources):
                turned = sources[0] is None
                taken[name] = [sources[turned], turned]
                del tensors[name]
    return {"folder": os.path.relpath(base.resolve(), folder.resolve()),
            "sha256": _weights_digest(base), "taken": taken}


def _given(content: Mapping[str, Any], folder: Path, base: str | Path | None) -> dict[str, Tensor]:
    """Return the tensors that a folder's base gives, by their names in the changed model."""
    if content["base"] is None:
        return {}
    place = Path(base) if base is not None else folder / content["base"]["folder"]
    if not place.is_dir():
        raise CorruptCheckpoint(f"{folder / CHANGES} holds what differs from {place}, which is not "
                                "there; say where it is now by base=")
    if _weights_digest(place) != content["base"]["sha256"]:
        raise CorruptCheckpoint(f"{place} is not what {folder / CHANGES} was written beside: its "
                                "weights have another digest")
    there = _weights(place)
    return {name: there[source].T if turned else there[source]
            for name, (source, turned) in content["base"]["taken"].items()}


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder of `save`'s or of Hugging Face's."""
    from safetensors import SafetensorError
    _recover(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= read_tensors(path)
        except (SafetensorError, OSError, ValueError, zlib.error) as error:
            raise CorruptCheckpoint(f"{path} cannot be read ({error})") from error
    if not tensors:
        raise CorruptCheckpoint(f"{folder} holds no .safetensors file; give the folder of the "
                                "model that was reshaped")
    return tensors


def _held(tensor: Tensor) -> tuple[str, torch.Size, str]:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return str(tensor.dtype), tensor.shape, hashlib.sha256(flat.numpy().data).hexdigest()


def _weights_digest(folder: Path) -> str:
    """Return a digest of all weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(_digest(path).encode())
    return digest.hexdigest()


# Reading.

def _content(folder: Path) -> dict[str, Any]:
    """Return what `changes.json` says, checked."""
    path = folder / CHANGES
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing: {folder} is no folder that netwright.save "
                                "wrote")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        kind = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error}); restore {folder} from a "
                                "copy") from error
    if kind != FORMAT:
        raise CorruptCheckpoint(f"{path} is of format {kind}, and this version of netwright reads "
                                f"{FORMAT}; use the version that wrote it, "
                                f"{content.get('netwright')}")
    if digest != _text_digest(content):
        raise CorruptCheckpoint(f"{path} does not match its own digest; restore {folder} from a "
                                "copy")
    return content


def _read(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    tensors: dict[str, Tensor] = {}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; restore {folder} from a copy")
        if _digest(path) != digest:
            raise CorruptCheckpoint(f"{path} does not match its digest in {CHANGES}; restore "
                                    f"{folder} from a copy")
        try:
            tensors |= read_tensors(path)
        except (SafetensorError, OSError, ValueError, zlib.error) as error:
            raise CorruptCheckpoint(f"{path} cannot be read ({error})") from error
    return tensors


def _check_class(model: nn.Module, content: Mapping[str, Any], folder: Path) -> None:
    given, wanted = history(model).origin["class"], content["original"]["class"]
    if given != wanted:
        raise ValueError(f"network must be a {wanted}, as the model in {folder} was before it was "
                         f"changed, got a {given}")


def _fill(model: Any, tensors: Mapping[str, Tensor], content: Mapping[str, Any],
          folder: Path) -> None:
    """Give `model` what was stored, in place."""
    _tie(model, content["tied"])
    extra = {name: state for name, state in tensors.items() if name.split(".")[-1] == _EXTRA}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in extra}
    for name, state in extra.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(state)
    known = {name: tensor for name, tensor, _ in _tensors(model)
             if name not in content["tied"]}
    lacking = [name for name in known if name not in tensors]
    if lacking or any(name not in known for name in tensors):
        name = next(iter(lacking), None) or next(n for n in tensors if n not in known)
        raise ValueError(f"network must be of the architecture that was reshaped, but with the "
                         f"changes of {folder} it has {'' if lacking else 'no '}{name!r}, and the "
                         f"saved model has {'not' if lacking else 'one'}; build it with the same "
                         "sizes")
    for name, stored in tensors.items():
        if known[name].shape != stored.shape:
            raise ValueError(f"network must be of the architecture that was reshaped, but {name!r} "
                             f"is {tuple(known[name].shape)}, and {tuple(stored.shape)} in "
                             f"{folder}; build it with the same sizes")
    for name, stored in tensors.items():
        here = known[name]
        # Copies, since a sum's rounding can depend on how a tensor lies in memory.
        strides = content["strides"].get(name)
        fresh = (torch.empty(stored.shape, dtype=stored.dtype) if strides is None else
                 torch.empty_strided(stored.shape, strides, dtype=stored.dtype))
        here.data = fresh.copy_(stored).to(here.device)
    frozen = set(content["frozen"])
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)
    modes, others = content["modes"]["training"], set(content["modes"]["others"])
    for name, module in model.named_modules():
        module.training = modes != (name in others)
    path = folder / "generation_config.json"
    if path.exists() and hasattr(model, "generation_config"):
        model.generation_config = type(model.generation_config).from_pretrained(folder)


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    for name, first in tied.items():
        (path, _, own), (other, _, source) = name.rpartition("."), first.rpartition(".")
        here, there = model.get_submodule(path), model.get_submodule(other)
        if own in here._parameters and source in there._parameters:
            here._parameters[own] = there._parameters[source]
        elif own in here._buffers and source in there._buffers:
            here._buffers[own] = there._buffers[source]


# Files.

def _recover(folder: Path) -> None:
    """Finish what a kill broke off after the new files were whole."""
    following = folder / _NEXT
    if not following.is_dir():
        return
    last = following / CHANGES  # moved last, so that until then this begins again
    if last.exists():
        try:
            written = set(json.loads(last.read_text(encoding="utf-8"))["written"])
        except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError) as error:
            raise CorruptCheckpoint(f"{last} cannot be read ({error}); remove {following}, and "
                                    f"{folder} is as it was before") from error
        for path in following.iterdir():
            if path != last:
                os.replace(path, folder / path.name)
        for name in _written(folder) - written:
            (folder / name).unlink(missing_ok=True)
        _flush(folder)
        os.replace(last, folder / CHANGES)
        _flush(folder)
    following.rmdir()


def _written(folder: Path) -> set[str]:
    """Return the files of the model in a folder: what its changes name, and all weights."""
    weights = {path.name for pattern in (WEIGHTS, f"{WEIGHTS}.index.json", BUFFERS,
                                         "model-*-of-*.safetensors")
               for path in folder.glob(pattern)}
    try:
        return weights | set(_content(folder)["written"])
    except CorruptCheckpoint:
        return weights
