"""What a narrowed or shortened model still does: all that the model it was made from did."""

import inspect
import io
import warnings
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.errors import CannotStage, NothingToReshape
from netwright.reshape import changes
from netwright.signals import apply, tensors
from tests.reshape.pruning.families import NETWORKS, PRETRAINED

STRUCTURED = {name: method.value for name, method in methods().items()
              if method.facets.kind == "reshape" and method.facets.needs == ("calibration data",)
              and method.value.__module__.startswith("netwright.reshape.pruning.")
              and {"parameters", "inference time"} <= set(method.facets.saves)}
ARGUMENTS = {"ratio": 0.25, "remove": 1, "multiple": 4}  # of those that a reshape takes
CASES = [(name, reshape) for name in NETWORKS for reshape in STRUCTURED]


def test_there_are_structured_reshapes():
    assert {"reshape.narrow", "reshape.prune_structures", "reshape.prune_sublayers",
            "reshape.prune_additive"} <= set(STRUCTURED)


def shrink(model, x, reshape):
    taken = inspect.signature(STRUCTURED[reshape]).parameters
    return STRUCTURED[reshape](model, x, **{key: value for key, value in ARGUMENTS.items()
                                            if key in taken})


def shrunk(name, reshape):
    model, x = NETWORKS[name][0](), NETWORKS[name][1]()
    try:
        return model, x, shrink(model, x, reshape)
    except NothingToReshape as error:
        pytest.skip(str(error))


def outputs(model, x):
    with torch.no_grad():
        return tensors(apply(model.eval(), x))[0]


@pytest.mark.check
@pytest.mark.parametrize(("name", "reshape"), CASES)
def test_it_lives_on(name, reshape, tmp_path):
    model, x, smaller = shrunk(name, reshape)
    before = {key: value.clone() for key, value in NETWORKS[name][0]().state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = outputs(smaller, x)
    assert sum(p.numel() for p in smaller.parameters()) < sum(
        p.numel() for p in model.parameters())
    file = io.BytesIO()
    torch.save(smaller, file)
    file.seek(0)
    for again in (deepcopy(smaller), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(again, x), expected)
    nw.save(smaller, tmp_path / "saved")
    loaded = nw.load(tmp_path / "saved", None if name in PRETRAINED else NETWORKS[name][0]())
    assert torch.equal(outputs(loaded, x), expected)
    loaded.load_state_dict(smaller.state_dict())

    compiled = torch.compile(deepcopy(smaller), backend="eager")
    assert torch.allclose(outputs(compiled, x), expected, atol=1e-5)
    torch._dynamo.reset()
    alone = deepcopy(smaller).eval()
    if hasattr(alone, "config"):
        alone.config.use_cache = False  # which torch.export does not return
    with warnings.catch_warnings(action="ignore"):  # of recurrent layers, changed or not
        exported = torch.export.export(alone, *(((), x) if isinstance(x, dict) else ((x,),)))
    assert torch.allclose(tensors(apply(exported.module(), x))[0], expected, atol=1e-5)

    assert nw.axes(smaller, x).groups
    with suppress(CannotStage):  # one block written in one forward is no chain without a part
        assert torch.allclose(tensors(nw.stages(smaller, x)(x))[0].detach(), expected, atol=1e-6)
    with suppress(NothingToReshape):
        twice = shrink(smaller, x, reshape)
        assert len(changes(twice)) == 2
        assert outputs(twice, x).shape == expected.shape

    learning = deepcopy(smaller).train()
    optimizer = torch.optim.AdamW(learning.parameters(), 1e-2)
    tensors(apply(learning, x))[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(outputs(learning, x), expected)


@pytest.mark.check
@pytest.mark.parametrize("reshape", STRUCTURED)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_generates_with_and_without_a_cache_with_beams_and_padding(name, reshape):
    _, _, smaller = shrunk(name, reshape)
    tokens = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    with_cache = smaller.generate(tokens, attention_mask=mask, use_cache=True, **common)
    without = smaller.generate(tokens, attention_mask=mask, use_cache=False, **common)
    assert torch.equal(with_cache, without)
    assert smaller.generate(tokens, attention_mask=mask, num_beams=3, **common).shape[0] == 2
    padded = nn.functional.pad(tokens, (3, 0))
    left = smaller.generate(padded, attention_mask=nn.functional.pad(mask, (3, 0)), **common)
    assert torch.equal(left[:, 10:], with_cache[:, 7:])


@pytest.mark.check
@pytest.mark.parametrize("reshape", STRUCTURED)
def test_peft_adds_adapters_to_it(reshape):
    peft = pytest.importorskip("peft")
    _, x, smaller = shrunk("llama", reshape)
    expected = outputs(smaller, x)
    adapted = peft.get_peft_model(deepcopy(smaller), peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.allclose(outputs(adapted, x), expected, atol=1e-6)
    outputs_ = tensors(apply(adapted.train(), x))[0]
    outputs_.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())
