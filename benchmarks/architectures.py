"""Tiny networks of every architecture of transformers, through every reshape that applies.

    python benchmarks/architectures.py [--only NAME ...] [--count 60] [--again]

Each architecture that a language, a vision or a translation model has in transformers is built
from its configuration with small sizes and random weights. Every reshape is carried out on it, and
its result is run, saved and loaded, let generate with a cache, compiled, and made from a bfloat16
model. A cell is "ok", "refused" with the reason, "not in the model" where the network itself
cannot do it, or says what went wrong. One architecture has `SECONDS` at most. What is in the
table already is not tried again unless it came to no end, so that a run that was stopped goes on
where it was.
"""

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import netwright as nw
from netwright.blocks import GLU
from netwright.runtime.machine import machine
from netwright.signals import call

RESULTS = Path(__file__).parent / "results" / "architectures.json"
SECONDS = 900
CELLS = ("run", "saved", "generate", "compiled", "bfloat16")
MAPPINGS = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
            "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
            "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
            "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"}
SIZES = {
    "hidden_size": 32, "d_model": 32, "embedding_size": 32, "hidden_dim": 32,
    "num_hidden_layers": 3, "num_layers": 3, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64,
    "d_ff": 64, "n_inner": 64, "moe_intermediate_size": 32, "vocab_size": 96,
    "max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 32,
    "max_target_positions": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "initializer_range": 0.1, "init_std": 0.1,
}


class NotAsked(Exception):
    """What an architecture does not do itself, so that nothing is asked of its changes."""


def architectures() -> dict[str, Callable[[], Any]]:
    """Return what makes each architecture, by name and what it is for."""
    found: dict[str, Callable[[], Any]] = {}
    classes: set[str] = set()
    for purpose, mapping in MAPPINGS.items():
        for kind, name in sorted(getattr(modeling_auto, mapping).items(), key=_another):
            name = name[0] if isinstance(name, tuple) else name
            if name not in classes:
                classes.add(name)
                found[f"{kind} ({purpose})"] = lambda kind=kind, name=name: _made(kind, name)
    return found


def _another(entry: tuple[str, Any]) -> tuple[bool, str]:
    """Return whether an architecture's model is called by another one's name."""
    kind, name = entry
    name = name[0] if isinstance(name, tuple) else name
    return not name.lower().startswith(kind.replace("_", "").replace("-", "")), kind


def _made(kind: str, name: str) -> Any:
    config_class: Any = CONFIG_MAPPING[kind]
    default = config_class()
    if getattr(default, "sub_configs", None):
        raise NotAsked("a model of several models")
    config = config_class(**{size: value for size, value in SIZES.items()
                             if isinstance(getattr(default, size, None), int | float)})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    count = sum(p.numel() for p in model.parameters())
    if count > 3_000_000:
        raise NotAsked(f"{count:,} parameters are left with small sizes")
    return model.eval()


def example(model: Any, rows: int = 2) -> dict[str, Tensor]:
    """Return an input of a model."""
    torch.manual_seed(1)
    config, main = model.config, model.main_input_name
    if main == "input_ids":
        tokens = torch.randint(3, config.vocab_size, (rows, 12))
        more = {"decoder_input_ids": torch.randint(3, config.vocab_size, (rows, 7))}
        return {"input_ids": tokens} | (more if config.is_encoder_decoder else {})
    if main == "pixel_values":
        return {"pixel_values": torch.randn(rows, config.num_channels, 32, 32)}
    if main == "input_features":
        return {"input_features": torch.randn(rows, config.num_mel_bins,
                                              2 * config.max_source_positions),
                "decoder_input_ids": torch.randint(3, config.vocab_size, (rows, 7))}
    raise NotAsked(f"takes {main}")


RESHAPES: dict[str, Callable[..., nn.Module]] = {
    "prune_sublayers": lambda m, x, **o: nw.reshape.prune_sublayers(m, x, remove=2, **o),
    "parallelize_residual": lambda m, x, **o: nw.reshape.parallelize_residual(m, x, **o),
    "reversible": lambda m, x, **o: nw.reshape.reversible(m, x, **o),
    "reversible (momentum)": lambda m, x, **o: nw.reshape.reversible(m, x, how="momentum", **o),
    "swap_feedforward": lambda m, x, **o: nw.reshape.swap_feedforward(m, GLU, x, **o),
    "share_feedforward": lambda m, x, **o: nw.reshape.share_feedforward(m, None, x, **o),
    "moefy": lambda m, x, **o: nw.reshape.moefy(m, x, n_experts=4, steps=2, **o),
    "upcycle": lambda m, x, **o: nw.reshape.upcycle(m, x, n_experts=2, **o),
    "mix_lora": lambda m, x, **o: nw.reshape.mix_lora(m, x, n_experts=2, rank=2, **o),
    "prune_experts": lambda m, x, **o: nw.reshape.prune_experts(m, x, keep=2, **o),
    "fuse_feedforward": lambda m, x, **o: nw.reshape.fuse_feedforward(m, x, dependence=2.0, **o),
}
KEPT = ("upcycle", "mix_lora")


class Wrong(Exception):
    """A result that is not what was promised."""


def outputs(model: nn.Module, x: Any) -> Tensor:
    """Return what a model gives, in eval mode and without a cache where there is a choice."""
    torch.manual_seed(2)
    with torch.no_grad():
        return call(model.eval(), x)


def causal(model: nn.Module, x: Any) -> bool:
    """Return whether a change of the last token, or of another row, leaves the other logits."""
    name = "decoder_input_ids" if "decoder_input_ids" in x else "input_ids"
    if name not in x:
        return False
    other = x[name].clone()
    other[0, -1] = (other[0, -1] + 1) % 90 + 3
    other[1:] = (other[1:] + 1) % 90 + 3
    a, b = outputs(model, x), outputs(model, x | {name: other})
    return torch.allclose(a[0, :-1], b[0, :-1], atol=1e-4) if a.ndim == 3 else False


def check_run(model: Any, result: Any, x: Any, name: str) -> None:
    """Raise Wrong unless the result runs in both modes, with outputs like the model's."""
    before, after = outputs(model, x), outputs(result, x)
    if before.shape != after.shape or not after.isfinite().all():
        raise Wrong(f"{tuple(after.shape)}, finite: {bool(after.isfinite().all())}")
    if name in KEPT and not torch.allclose(before, after, atol=1e-3):
        raise Wrong(f"the function moved by {(before - after).abs().max():.1e}")
    if causal(model, x) and not causal(result, x):
        raise Wrong("other tokens reach earlier ones")
    result.train()
    call(result, x).square().mean().backward()
    result.eval()


def check_saved(model: Any, result: Any, x: Any, name: str) -> None:
    """Raise Wrong unless the result is the same after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        nw.save(result, folder)
        again = nw.load(folder)
    if not torch.equal(outputs(again, x), outputs(result, x)):
        raise Wrong("other outputs after loading")


def check_generate(model: Any, result: Any, x: Any, name: str) -> None:
    """Raise Wrong unless the same is written with a cache and without, where the model does so."""
    def written(network: Any, cached: bool) -> Tensor:
        given = {k: v for k, v in x.items() if k != "decoder_input_ids"}
        torch.manual_seed(3)
        made = network.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                                use_cache=cached, output_logits=True,
                                return_dict_in_generate=True, pad_token_id=0)
        return torch.stack(made.logits)

    def near(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-3, rtol=1e-3)

    if not hasattr(model, "generate") or not model.can_generate():
        raise NotAsked
    try:
        same = near(written(model, True), written(model, False))
    except Exception as error:
        raise NotAsked from error
    if not same:
        raise NotAsked
    a, b = written(result, True), written(result, False)
    if not near(a, b):
        raise Wrong(f"the cache moves the logits by {(a - b).abs().max():.1e}")


def check_compiled(model: Any, result: Any, x: Any, name: str) -> None:
    """Raise Wrong unless the compiled result gives the same."""
    def compiled(network: Any) -> Tensor:
        torch._dynamo.reset()
        try:
            return outputs(torch.compile(network, backend="eager"), x)
        finally:
            torch._dynamo.reset()
    try:
        compiled(model)
    except Exception as error:
        raise NotAsked from error
    if not torch.allclose(compiled(result), outputs(result, x), atol=1e-3):
        raise Wrong("other outputs when compiled")


def reshaped_in_bfloat16(make: Callable[[], Any], x: Any, name: str) -> None:
    """Raise Wrong unless the reshape works on the model in bfloat16."""
    model = make().to(torch.bfloat16)
    x = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in x.items()}
    try:
        outputs(model, x)
    except Exception as error:
        raise NotAsked from error
    result = RESHAPES[name](model, x, check=False)
    if not outputs(result, x).isfinite().all():
        raise Wrong("not finite in bfloat16")


CHECKS = {"run": check_run, "saved": check_saved, "generate": check_generate,
          "compiled": check_compiled}


def rows(make: Callable[[], Any], wanted: Sequence[str],
         check_results: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each reshape's cells."""
    model = make()
    x = example(model)
    outputs(model, x)
    for name, reshape in RESHAPES.items():
        made: list[Any] = []
        first = cell(lambda reshape=reshape, made=made: made.append(
            reshape(model, x, check=check_results)))
        if not made:
            yield name, {"reshape": first}
            continue
        cells = {what: cell(lambda check=check, made=made, name=name: check(
            model, made[0], x, name)) for what, check in CHECKS.items() if what in wanted}
        if "bfloat16" in wanted:
            cells["bfloat16"] = cell(lambda name=name: reshaped_in_bfloat16(make, x, name))
        yield name, cells


def cell(check: Callable[[], Any]) -> str:
    """Return what came of a check."""
    try:
        check()
    except Wrong as error:
        return f"WRONG: {error}"
    except NotAsked as error:
        return "not in the model" if not str(error) else f"refused: {error}"
    except ValueError as error:
        module = type(error).__module__
        said = "refused" if module.startswith("netwright") or _raised_by_us(error) else "CRASH"
        return f"{said}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}"
    return "ok"


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "netwright" in trace.tb_frame.f_globals.get("__name__", "")


def _one(name: str, wanted: Sequence[str], check_results: bool, out: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        for reshape, cells in rows(architectures()[name], wanted, check_results):
            out.send((reshape, cells))
            gc.collect()
    except Exception as error:
        out.send(("model", {"model": f"{type(error).__name__}: {error}"}))
    out.send(None)


def tried(name: str, wanted: Sequence[str], check_results: bool) -> dict[str, dict[str, str]]:
    """Return an architecture's rows, found in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_one, args=(name, wanted, check_results, theirs))
    process.start()
    theirs.close()
    found, end = {}, time.monotonic() + SECONDS
    with contextlib.suppress(EOFError):
        while ours.poll(max(0, end - time.monotonic())):
            got = ours.recv()
            if got is None:
                break
            found[got[0]] = got[1]
        else:
            found["model"] = {"model": f"no end within {SECONDS} s"}
    process.kill()
    process.join()
    return found


def _cut_off(rows: dict[str, dict[str, str]]) -> bool:
    return rows.get("model", {}).get("model", "").startswith("no end")


def main() -> None:
    """Try them, and write what was found after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--unchecked", action="store_true", help="to see what a check would raise")
    parser.add_argument("--count", type=int, help="how many, evenly over all in alphabetical order")
    parser.add_argument("--again", action="store_true", help="what is in the table as well")
    parser.add_argument("--to", type=Path, default=RESULTS)
    given = parser.parse_args()
    table: dict[str, Any] = (json.loads(given.to.read_text())["table"] if given.to.exists() else {})
    names = list(architectures())
    if given.count:
        names = names[::max(1, len(names) // given.count)]
    for name in names:
        if given.only and not any(name.split(" ")[0] == part for part in given.only):
            continue
        if name in table and not (given.again or _cut_off(table[name])):
            continue
        table[name] = tried(name, given.cells, not given.unchecked)
        print(name, json.dumps(table[name])[:200], flush=True)
        given.to.write_text(json.dumps({"machine": machine(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
