from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import parallelize_residual, reversible
from netwright.stages import call

IDS = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0


class Residual(nn.Module):
    def __init__(self, width=8, scale=1.0):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), scale
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(0.2),
                                 nn.Linear(2 * width, width))

    def forward(self, h):
        return h + self.scale * self.mlp(self.norm(h))


class Linear(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, h):
        return h + self.layer(h)


class Convolutional(nn.Module):
    """Activated after the sum, with batch norm."""

    def __init__(self, width=4):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, h):
        return torch.relu(h + self.branch(h))


class Looped(nn.Module):
    """Hands its blocks a mask beside the signal, and takes tuples from them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, h, mask, scale=1.0):
            return (h + scale * self.layer(h.tanh() * mask), None)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([self.Block() for _ in range(4)])

    def forward(self, x, mask):
        h = self.first(x)
        for i in range(len(self.blocks)):
            h, _ = self.blocks[i](h, mask, scale=0.5)
        return self.last(h)


class Compiled(nn.Sequential):
    """Has what torch.compile gives a module, which takes seconds to import."""

    _orig_mod = None


def hugging_face(name, task):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
             "num_attention_heads": 2}
    if name == "ViT":
        sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
    elif name == "GPT2":
        sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16,
                 "bos_token_id": 0, "eos_token_id": 0}
    else:
        sizes |= {"vocab_size": 20, "pad_token_id": 0}
    prefix = "" if name == "GPT2" else "For"
    model = getattr(transformers, f"{name}{prefix}{task}")(
        getattr(transformers, f"{name}Config")(**sizes))
    return model, ({"pixel_values": torch.randn(3, 1, 8, 8)} if name == "ViT" else
                   {"input_ids": IDS, "attention_mask": MASK})


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 8), stack, nn.Linear(8, 3)), torch.randn(3, 6, 5)


MODELS = {
    "residual": (lambda: (nn.Sequential(nn.Linear(5, 8), *[Residual() for _ in range(4)],
                                        nn.Linear(8, 3)), torch.randn(3, 5)), "1 2 3 4"),
    "convolutional": (lambda: (nn.Sequential(
        nn.Conv2d(1, 4, 3), *[Convolutional() for _ in range(3)], nn.Flatten(),
        nn.Linear(144, 3)), torch.randn(3, 1, 8, 8)), "1 2 3"),
    "looped": (lambda: (Looped(), (torch.randn(3, 5), (torch.rand(3, 8) > 0.3).float())),
               "blocks.0 blocks.1 blocks.2 blocks.3"),
    "gpt": (lambda: (gpt(20, 8, width=16, depth=3), IDS), "1 2 3"),
    "encoder": (encoder, "1.layers.0 1.layers.1 1.layers.2"),
    "vit": (lambda: hugging_face("ViT", "ImageClassification"), None),
    "bert": (lambda: hugging_face("Bert", "SequenceClassification"), None),
    "llama": (lambda: hugging_face("Llama", "CausalLM"), None),
    "gpt2": (lambda: hugging_face("GPT2", "LMHeadModel"), None),
}


def layers(model, names):
    if names:
        return [model.get_submodule(name) for name in names.split()]
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def side_by_side(model, x, names):
    """The model's output with every layer given the first one's input, and their sum passed on."""
    model, seen = deepcopy(model), {}

    def before(module, args):
        seen.setdefault("h", args[0])
        return (seen["h"], *args[1:])

    def after(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        seen["sum"] = seen.get("sum", seen["h"]) + (out - seen["h"])
        return (seen["sum"], *output[1:]) if isinstance(output, tuple) else seen["sum"]

    for layer in layers(model, names):
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    return call(model, x)


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_reads_the_first_ones_input(kind):
    torch.manual_seed(0)
    make, names = MODELS[kind]
    model, x = make()
    with torch.no_grad():
        for p in model.eval().parameters():  # fresh branches of some models hardly add anything
            p.add_(torch.randn_like(p), alpha=0.3)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    broad = parallelize_residual(model, x)
    expected, found = side_by_side(model, x, names), call(broad, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - call(model, x)).abs().max() > 1e-4  # it is another function
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert len(broad.parallel_changes) == 1


def test_gradients_are_those_of_the_sum():
    torch.manual_seed(0)
    blocks = [Residual().double().eval() for _ in range(3)]
    model = nn.Sequential(*blocks).eval()
    broad = parallelize_residual(model, torch.randn(2, 8, dtype=torch.double))
    x = torch.randn(4, 8, dtype=torch.double, requires_grad=True)
    expected = x + sum(block(x) - x for block in blocks)
    torch.testing.assert_close(broad(x), expected)
    mine, theirs = [torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
                    for y, net in ((broad(x), broad), (expected, model))]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_linear_branches_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(*[Linear().double() for _ in range(5)])
    x = torch.randn(3, 4, dtype=torch.double)
    matrix = torch.eye(4, dtype=torch.double) + sum(block.layer.weight for block in model)
    torch.testing.assert_close(parallelize_residual(model, x)(x), x @ matrix.T)


def test_what_is_left_out_is_of_second_order():
    def off(scale):
        torch.manual_seed(0)
        model = nn.Sequential(*[Residual(scale=scale).double() for _ in range(4)]).eval()
        x = torch.randn(20, 8, dtype=torch.double)
        return float((parallelize_residual(model, x)(x) - model(x)).norm().detach())

    assert 3.7 < off(0.02) / off(0.01) < 4.3


def test_groups_stay_one_after_another():
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(5)]
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(3, 8)
    broad = parallelize_residual(model, x, group=2)
    h = x
    for pair in (blocks[:2], blocks[2:4], blocks[4:]):
        h = h + sum(block(h) - h for block in pair)
    torch.testing.assert_close(broad(x), h)
    assert broad.parallel_changes == ("0 to 1: 2 blocks (Residual) side by side",
                                      "2 to 3: 2 blocks (Residual) side by side")


def test_it_trains_saves_and_copies():
    torch.manual_seed(0)
    model = MODELS["residual"][0]()[0].train()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    broad = parallelize_residual(model, torch.randn(2, 5, generator=torch.Generator()))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in broad.modules())
    x = torch.randn(4, 5)
    optimizer = torch.optim.SGD(broad.parameters(), 0.1)
    before = broad(x).square().mean()
    before.backward()
    assert all(p.grad is not None for p in broad.parameters())
    optimizer.step()
    other = parallelize_residual(MODELS["residual"][0]()[0], x)
    other.load_state_dict(broad.state_dict())
    for copy in (other, deepcopy(broad)):
        assert torch.equal(copy.eval()(x), broad.eval()(x))


def test_a_cached_generation_is_an_uncached_one():
    torch.manual_seed(0)
    model, x = hugging_face("GPT2", "LMHeadModel")
    broad = parallelize_residual(model.eval())
    with torch.no_grad():
        made = [broad.generate(x["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0,
                               use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


def test_what_has_no_runs_is_refused():
    with pytest.raises(NothingToReshape, match="no residual blocks in a row"):
        parallelize_residual(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
                             torch.randn(2, 5))
    with pytest.raises(NothingToReshape, match="no residual blocks in a row"):
        parallelize_residual(nn.Sequential(nn.Linear(5, 8), Residual()), torch.randn(2, 5))
    with pytest.raises(NothingToReshape, match=r"compiled by torch\.compile"):
        parallelize_residual(Compiled(Residual(), Residual()), torch.randn(2, 8))


def test_wrong_arguments():
    model, x = nn.Sequential(Residual(), Residual()), torch.randn(2, 8)
    with pytest.raises(ValueError, match="group must be at least 2, got 1"):
        parallelize_residual(model, x, group=1)
    with pytest.raises(ValueError, match="example must be an input of Sequential"):
        parallelize_residual(model)


def test_a_reversible_network_has_no_blocks_left():
    model, x = nn.Sequential(Residual(), Residual(), Residual()), torch.randn(2, 8)
    with pytest.raises(NothingToReshape):
        parallelize_residual(reversible(model, x), x)
