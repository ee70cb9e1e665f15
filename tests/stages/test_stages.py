import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import netwright as nw
from netwright.errors import CannotStage, UnknownName
from netwright.stages import Stages, call


def run(network: Callable[[Any], Tensor], model: nn.Module, x: Any) -> dict[str, Any]:
    """Run forward and backward from one random state; return all that it leaves behind."""
    model.zero_grad()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(5)
    output = network(x)
    drawn = torch.get_rng_state()
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    left = {"output": output.detach(), "random state": drawn}
    left |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    for name, b in model.named_buffers():
        left[f"buffer {name}"] = b.clone()
        b.data.copy_(buffers[name])
    return left


def assert_same(net: Stages, x: Any, *, exact: bool = True) -> None:
    """Assert that the stages do what the model does, bit for bit, in both modes."""
    model = net.model
    keys = list(model.state_dict())
    for mode in (False, True):
        model.train(mode)
        expected = run(lambda x: call(model, x), model, x)
        got = run(net, model, x)
        for what, value in expected.items():
            if value is None:
                assert got[what] is None, what
            elif exact or not what.startswith("gradient"):
                assert torch.equal(got[what], value), f"{what}, training={mode}"
            else:
                torch.testing.assert_close(got[what], value)
    used = {id(p) for stage in net for p in stage.parameters()}
    assert used <= {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        assert p.grad is None or id(p) in used, f"{name} belongs to no stage"
    assert list(model.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.modules())


def local_step(net: Stages, x: Any) -> list[Tensor]:
    """Differentiate each stage by itself, as local rules do; return the signals."""
    net.model.zero_grad()
    context, h, signals = net.context(x), x, []
    for stage in net:
        h = stage(h, context)
        h.square().sum().backward()
        h = h.detach()
        signals.append(h)
    return signals


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True),
                         nn.Dropout(0.3), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class Residual(nn.Module):
    """A hand-written residual network, with a loose parameter at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8),
                                  nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(8, 8), Block(8, 8), Block(8, 16, 2)])
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x.mean((2, 3)) * self.scale))


class Functional(nn.Module):
    """Layers with functional code between them, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(64, 8)
        self.matrix = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = functional.relu(self.conv1(x))
        x = functional.max_pool2d(x + functional.relu(self.norm(self.conv2(x))), 2)
        x = functional.dropout(x, 0.3, self.training)
        x = torch.tanh(self.fc(torch.flatten(x, 1)))
        if scale is not None:
            x = x * scale
        return functional.linear(x, self.matrix)


class Parallel(nn.Module):
    """Two layers of which neither feeds the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


# Sequences


def test_sequence_starts_a_stage_at_each_weighted_layer() -> None:
    net = nw.stages(mlp())
    assert net.names == ["0", "5", "7"]
    assert len(net) == 3
    assert [len(stage.parameters()) for stage in net] == [4, 2, 2]
    assert net[1].parameters()[0] is net.model[5].weight
    assert len(net.parameters()) == 8
    assert_same(net, torch.randn(6, 3, 4))


def test_sequence_opens_plain_sequences_but_not_blocks() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
                            nn.Sequential(Block(8, 8), nn.MaxPool2d(2), Block(8, 16)),
                            nn.Flatten(), nn.LayerNorm((16 * 9,)), nn.Linear(16 * 9, 5))
    net = nw.stages(network, torch.randn(2, 3, 8, 8))
    assert net.names == ["0.0", "1.0", "1.2", "4"]
    assert_same(net, torch.randn(4, 3, 8, 8))


def test_sequence_with_a_repeated_module() -> None:
    act = nn.ReLU()
    net = nw.stages(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act))
    x = torch.randn(3, 4)
    assert net.names == ["0", "2"]
    assert torch.equal(net(x), net.model(x))
    assert net(x).min() >= 0


def test_norms_with_matrices_join_the_stage_before() -> None:
    net = nw.stages(nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 2, 2)), nn.Flatten(),
                                  nn.Linear(8, 2)))
    assert net.names == ["0", "3"]


def test_sequence_in_double_precision_with_frozen_parameters() -> None:
    network = mlp().double()
    network[5].requires_grad_(False)
    net = nw.stages(network, torch.randn(6, 12, dtype=torch.float64))
    assert_same(net, torch.randn(6, 12, dtype=torch.float64))
    assert len(net.parameters(1)) == 2


def test_single_layer_is_one_stage() -> None:
    net = nw.stages(nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4))
    assert len(net) == 1


def test_stages_of_stages_are_themselves_unless_cut() -> None:
    net = nw.stages(mlp())
    assert nw.stages(net) is net
    assert nw.stages(net, cuts=["0", "7"]).names == ["0", "7"]


# Any module, watched


def test_hand_written_residual_network() -> None:
    net = nw.stages(Residual(), torch.randn(2, 3, 8, 8))
    assert net.names == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    assert any(p is net.model.scale for p in net.parameters(3))
    assert not any(p is net.model.scale for p in net.parameters(0))
    assert_same(net, torch.randn(4, 3, 8, 8))


def test_another_batch_size_and_image_size_than_the_example() -> None:
    net = nw.stages(Residual().eval(), torch.randn(2, 3, 8, 8))
    x = torch.randn(5, 3, 12, 12)
    assert torch.equal(net(x), net.model(x))


def test_functional_code_between_layers() -> None:
    net = nw.stages(Functional(), torch.randn(2, 3, 8, 8))
    assert net.names == ["conv1", "conv2", "fc", "matrix"]
    assert_same(net, torch.randn(4, 3, 8, 8))
    assert net.parameters(3)[0] is net.model.matrix
    assert not any(name.startswith("_tensor_constant") for name in net.model.__dict__)


def test_functional_code_with_a_second_argument() -> None:
    x = {"x": torch.randn(2, 3, 8, 8), "scale": torch.tensor(2.0)}
    net = nw.stages(Functional(), x)
    assert_same(net, x)
    with pytest.raises(CannotStage, match="was now given"):
        net(torch.randn(2, 3, 8, 8))


def test_only_tensors_pass_between_traced_stages() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.head = nn.Linear(4, 8), nn.Linear(4, 2)
            self.middle = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            halves = self.both(x).chunk(2, -1)
            h = self.middle(halves[0]) * torch.sigmoid(halves[1])
            return self.head(h)

    net = nw.stages(Gated(), torch.randn(2, 4))
    assert net.names == ["both", "head"] or net.names == ["both", "middle", "head"]
    assert_same(net, torch.randn(3, 4))
    assert all(isinstance(h, Tensor) for h in local_step(net, torch.randn(3, 4)))


def test_convolutions_on_graphs_in_a_network_of_ones_own() -> None:
    convolution = pytest.importorskip("torch_geometric.nn").GCNConv

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = convolution(5, 8), convolution(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = functional.relu(self.first(x, edge_index))
            return self.second(functional.dropout(x, 0.5, self.training), edge_index)

    net = nw.stages(Network(), (NODES, EDGES))
    assert net.names == ["first", "second"]
    assert_same(net, (NODES, EDGES))


def test_transformer_of_pytorch_with_padding() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
            self.embed = nn.Embedding(50, 16)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            h = self.encoder(self.embed(x), src_key_padding_mask=padding)
            return self.head(h.mean(1))

    x = (TOKENS, PADDED == 0)
    net = nw.stages(Encoder(), x)
    assert net.names == ["embed", *(f"encoder.layers.{i}" for i in range(3))]
    assert_same(net, x)


def test_modules_in_modes_of_their_own() -> None:
    net = nw.stages(Functional(), torch.randn(2, 3, 8, 8))
    net.model.train()
    net.model.norm.eval()
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    expected = net.model(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), expected)


def test_skip_from_the_entry_to_the_exit_has_its_gradient() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4), nn.Linear(8, 2)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.embed(x)
            h = first * 2
            for layer in self.layers:
                h = layer(h)
            return self.head(torch.cat([h, first], 1))

    net = nw.stages(Skipping(), torch.randn(2, 4))
    assert net.names == ["layers.0", "layers.1", "layers.2"]
    assert_same(net, torch.randn(3, 4))
    local_step(net, torch.randn(3, 4))


def test_entry_that_changes_its_output_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh())
                                        for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h += self.place
            for layer in self.layers:
                h = layer(h)
            return h + 1

    net = nw.stages(InPlace(), torch.randn(2, 4), cuts=["layers.0", "layers.1", "layers.2"])
    assert_same(net, torch.randn(3, 4))
    assert any(p is net.model.place for p in net.parameters(0))


def test_hooks_see_real_calls_only() -> None:
    model, seen = Residual(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net = nw.stages(model, torch.randn(2, 3, 8, 8))
    seen.clear()
    net(torch.randn(2, 3, 8, 8))
    assert len(seen) == 3
    assert all(len(block._forward_hooks) == 1 for block in model.blocks)


# Cuts


def test_cuts_join_stages() -> None:
    x = torch.randn(3, 12)
    net = nw.stages(mlp(), x, cuts=["1", "7"])
    assert net.names == ["1", "7"]
    assert_same(net, x)


def test_cuts_of_a_watched_network() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nw.stages(Residual(), x, cuts=["blocks.0", "blocks.2"])
    assert net.names == ["blocks.0", "blocks.2"]
    assert_same(net, x)


def test_cuts_where_functional_code_lies_between() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nw.stages(Functional(), x, cuts=["conv1", "fc"])
    assert net.names == ["conv1", "fc"]
    assert_same(net, x)


def test_one_cut_makes_one_stage() -> None:
    x = torch.randn(2, 4)
    net = nw.stages(Parallel(), x, cuts=["left"])
    assert len(net) == 1
    assert_same(net, x)


# What a stage promises


def test_stage_may_be_run_again_on_another_signal() -> None:
    net = nw.stages(Residual().eval(), torch.randn(2, 3, 8, 8))
    context = net.context(torch.randn(2, 3, 8, 8))
    h = torch.randn(2, 8, 8, 8)
    last = torch.randn(2, 8, 8, 8)
    assert torch.equal(net[1](h, context), net.model.blocks[0](h))
    assert not torch.equal(net[1](h + 1, context), net[1](h, context))
    assert torch.equal(net[3](last, context), net[3](last, context))
    expected = net.model.blocks[2](last).mean((2, 3)) * net.model.scale
    assert torch.equal(net[3](last, context), net.model.head(expected))


def test_later_stage_first_leaves_no_trace() -> None:
    net = nw.stages(Residual().train(), torch.randn(2, 3, 8, 8))
    before = {name: b.clone() for name, b in net.model.named_buffers()}
    h, context = torch.randn(2, 8, 8, 8), net.context(torch.randn(2, 3, 8, 8))
    state = torch.get_rng_state()
    net[1](h, context)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(net.model.named_buffers())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("blocks.0.") for name in moved)


def test_staging_leaves_no_trace() -> None:
    model = Residual().train()
    model.blocks[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    nw.stages(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("build", [Residual, Functional])
def test_activations_are_freed_stage_by_stage(build: Callable[[], nn.Module]) -> None:
    net = nw.stages(build(), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    context = net.context(x)
    h = net[0](x, context)
    inside = weakref.ref(h)
    h = net[1](h.detach(), context)
    gc.collect()
    assert inside() is None
    assert all(s.requires_grad is False for s in local_step(net, x))


def test_forward_mode_gives_the_directional_derivative() -> None:
    net = nw.stages(Residual().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    x, direction = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = net(forward_ad.make_dual(x, direction))
        got = forward_ad.unpack_dual(dual).tangent
    expected = (net(x + 1e-6 * direction) - net(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_autocast() -> None:
    net = nw.stages(Residual(), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(net.model, net.model, x)
        got = run(net, net.model, x)
        context = net.context(x)
        net.model.zero_grad()
        net[2](net[1](torch.randn(2, 8, 8, 8), context), context).sum().backward()
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert all(p.grad is not None for p in net.parameters(2))


@pytest.mark.parametrize("build", [Residual, Functional])
def test_copies_share_with_their_own_model(build: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nw.stages(build().eval(), x)
    expected = net(x)
    for twin in (copy.deepcopy({"model": net.model, "net": net}),
                 pickle.loads(pickle.dumps({"model": net.model, "net": net}))):
        assert twin["net"].model is twin["model"]
        assert torch.equal(twin["net"](x), expected)
        ours = {id(p) for p in twin["model"].parameters()}
        assert all(id(p) in ours for stage in twin["net"] for p in stage.parameters())
        with torch.no_grad():
            for p in twin["model"].parameters():
                p.zero_()
        assert not twin["net"](x).any()
    assert torch.equal(net(x), expected)


def test_failed_run_leaves_the_model_as_it_was() -> None:
    net = nw.stages(Residual(), torch.randn(2, 3, 8, 8))
    context = net.context(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 8, 8))
    with pytest.raises(RuntimeError):
        net[3](torch.randn(2, 5, 8, 8), context)
    assert not any("forward" in m.__dict__ for m in net.model.modules())


def test_table() -> None:
    x = torch.randn(2, 3, 8, 8)
    rows = nw.stages(Residual(), x).table(x)
    assert [row["name"] for row in rows] == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    assert rows[0]["shape"] == (2, 8, 8, 8)
    assert rows[-1]["shape"] == (2, 4)
    assert sum(row["parameters"] for row in rows) == sum(
        p.numel() for p in Residual().parameters())
    assert rows[0]["modules"] == ["Sequential"]
    assert nw.stages(mlp()).table()[0]["shape"] is None


@pytest.mark.parametrize("output", [
    {"logits": torch.ones(2)}, (torch.tensor(3.0), torch.ones(2)), torch.ones(2)])
def test_call_finds_the_output(output: Any) -> None:
    class Fixed(nn.Module):
        def forward(self, *args: Any) -> Any:
            return output

    assert torch.equal(call(Fixed(), (1, 2)), torch.ones(2))


def test_call_without_a_tensor() -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    with pytest.raises(CannotStage, match="returned str"):
        call(Text(), torch.ones(2))


def test_neither_transformers_nor_graphs_are_imported() -> None:
    code = ("import sys, torch, netwright as nw; from torch import nn; "
            "nw.stages(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)); "
            "print([m for m in ('transformers', 'torch_geometric') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Errors


@pytest.mark.parametrize(("network", "match"), [
    (nn.Sequential(), "is empty"),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "no layer with weights, only ReLU, BatchNorm1d"),
    (nn.Sequential(nn.Sequential(), nn.Identity()), "no layer with weights"),
])
def test_sequence_without_stages(network: nn.Module, match: str) -> None:
    with pytest.raises(CannotStage, match=match):
        nw.stages(network)


@pytest.mark.parametrize("example", [None, torch.randn(2, 4)])
def test_compiled_network_has_no_parts(example: Tensor | None) -> None:
    compiled = torch.compile(mlp(), backend="eager")
    with pytest.raises(CannotStage, match=r"compiled by torch\.compile.*give the module"):
        nw.stages(compiled, example)  # type: ignore[arg-type]


def test_example_of_the_wrong_shape_names_the_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(CannotStage, match=r"shape \(2, 4\).*failed at 2 \(Linear"):
        nw.stages(network, torch.randn(2, 4))
    with pytest.raises(CannotStage, match=r"shape \(2, 3, 9\).*give an example="):
        nw.stages(Residual(), torch.randn(2, 3, 9))


def test_watched_network_needs_an_example() -> None:
    with pytest.raises(CannotStage, match="example="):
        nw.stages(Residual())


def test_network_that_is_no_chain_gets_advice_that_works() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(CannotStage, match=r"it called left, right.*cuts=\['left'\]"):
        nw.stages(Parallel(), x)
    assert len(nw.stages(Parallel(), x, cuts=["left"])) == 1


def test_network_whose_path_depends_on_values() -> None:
    class Branching(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.left(x))
            return self.right(x + 1) if x.sum() > 0 else self.right(x)

    with pytest.raises(CannotStage, match="cannot trace"):
        nw.stages(Branching(), torch.randn(2, 4))


def test_network_without_weights() -> None:
    with pytest.raises(CannotStage, match="no layer with weights"):
        nw.stages(nn.ReLU(), torch.randn(2, 4))


def test_network_without_layers_of_its_own() -> None:
    with pytest.raises(CannotStage, match=r"give nn.Sequential\(network\)"):
        nw.stages(nn.Linear(3, 3), torch.randn(2, 3))
    assert len(nw.stages(nn.Sequential(nn.Linear(3, 3)))) == 1


def test_random_numbers_that_no_stage_can_draw() -> None:
    class Noisy(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            return self.right(torch.relu(self.left(x)) + torch.randn(4))

    with pytest.raises(CannotStage, match=r"random numbers|outputs differ"):
        nw.stages(Noisy(), torch.randn(2, 4))


def test_layers_dropped_in_training() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand([]) > 0.5:
                    x = layer(x)
            return x

    with pytest.raises(CannotStage, match="in train mode"):
        nw.stages(Dropping(), torch.randn(2, 4))


def test_cuts_with_an_unknown_name() -> None:
    with pytest.raises(UnknownName, match=r"blocks.7.*did you mean blocks"):
        nw.stages(Residual(), torch.randn(2, 3, 8, 8), cuts=["stem", "blocks.7"])


@pytest.mark.parametrize("cuts", [[], "stem"])
def test_cuts_that_are_no_names(cuts: Any) -> None:
    with pytest.raises(CannotStage, match="cuts must be a list"):
        nw.stages(Residual(), torch.randn(2, 3, 8, 8), cuts=cuts)


def test_cuts_that_name_a_module_twice() -> None:
    with pytest.raises(CannotStage, match="twice"):
        nw.stages(mlp(), cuts=["1", "1"])


def test_cuts_in_the_wrong_order() -> None:
    with pytest.raises(CannotStage, match=r"try cuts=\['0', '7'\]"):
        nw.stages(mlp(), cuts=["7", "0"])
    with pytest.raises(CannotStage, match=r"try cuts=\['stem', 'blocks.0'"):
        nw.stages(Residual(), torch.randn(2, 3, 8, 8), cuts=["blocks.1", "blocks.0"])


def test_cuts_that_do_not_chain() -> None:
    with pytest.raises(CannotStage, match="left leads to"):
        nw.stages(Parallel(), torch.randn(2, 4), cuts=["left", "right"])
    with pytest.raises(CannotStage, match=r"conv2.*try cuts="):
        nw.stages(Residual(), torch.randn(2, 3, 8, 8), cuts=["stem", "blocks.0.conv2"])


def test_network_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="got str"):
        nw.stages("model")  # type: ignore[arg-type]


# PyTorch Geometric

NODES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
GRAPH_NETWORKS = ["GCN", "GraphSAGE", "GAT", "GIN"]


def graph_network(kind: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("torch_geometric.nn.models")
    return getattr(models, kind)(5, 8, 3, 4, dropout=0.3, **options)


@pytest.mark.parametrize("norm", [None, "batch_norm", "graph_norm"])
@pytest.mark.parametrize("kind", GRAPH_NETWORKS)
def test_graph_network(kind: str, norm: str | None) -> None:
    net = nw.stages(graph_network(kind, norm=norm), (NODES, EDGES))
    assert net.names == ["convs.0", "convs.1", "convs.2"]
    assert_same(net, (NODES, EDGES))
    assert local_step(net, (NODES, EDGES))[0].shape == (6, 8)
    context = net.context((NODES, EDGES))
    h = torch.randn(6, 8)
    assert torch.equal(net.model.eval() and net[2](h, context), net.model.convs[2](h, EDGES))


@pytest.mark.parametrize("jk", ["last", "cat", "max", "lstm"])
def test_graph_network_that_joins_its_layers(jk: str) -> None:
    net = nw.stages(graph_network("GCN", jk=jk), (NODES, EDGES))
    assert_same(net, (NODES, EDGES), exact=False)
    local_step(net, (NODES, EDGES))
    net.model.eval()
    last = net[2](torch.randn(6, 8), net.context((NODES, EDGES)))  # the others have not run
    assert last.shape == (6, 4)


def test_graph_network_with_edge_weights_and_cuts() -> None:
    x = {"x": NODES, "edge_index": EDGES, "edge_weight": torch.rand(7)}
    net = nw.stages(graph_network("GCN", norm="layer_norm", act_first=True), x,
                    cuts=["convs.0", "convs.2"])
    assert net.names == ["convs.0", "convs.2"]
    assert_same(net, x)


def test_graph_network_with_wrong_cuts() -> None:
    with pytest.raises(CannotStage, match=r"try cuts=\['convs.0'"):
        nw.stages(graph_network("GCN"), cuts=["convs.1", "convs.0"])


def test_graph_network_that_drops_nodes() -> None:
    net = nw.stages(graph_network("GCN"))
    x = {"x": NODES, "edge_index": EDGES, "num_sampled_nodes_per_hop": [2, 2, 2],
         "num_sampled_edges_per_hop": [2, 2, 2]}
    with pytest.raises(CannotStage, match="num_sampled_nodes_per_hop"):
        net(x)


# Hugging Face

TOKENS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
TEXT = {"input_ids": TOKENS, "attention_mask": PADDED}
LEFT = {"input_ids": TOKENS, "attention_mask": PADDED.flip(1)}
IMAGES = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32}
LLAMA = BERT | {"num_key_value_heads": 1, "attention_dropout": 0.1, "pad_token_id": 0}
GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
       "intermediate_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1,
       "attention_probs_dropout_prob": 0.1}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [2, 2, 3],
          "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16, 24], "depths": [2, 2, 2], "num_stages": 3,
            "drop_path_rate": 0.2, "image_size": 32, "patch_size": 4}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2,
      "decoder_start_token_id": 0}
OPT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
       "ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2],
        "num_heads": [1, 2, 2], "window_size": 4}
DISTILBERT = {"vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32,
              "max_position_embeddings": 32}

FAMILIES = [
    ("ViTForImageClassification", VIT, IMAGES, "vit.layers.0"),
    ("ViTModel", VIT, IMAGES["pixel_values"], "layers.0"),
    ("ResNetForImageClassification", RESNET, IMAGES, "resnet.encoder.stages.0"),
    ("ResNetModel", RESNET, IMAGES, "encoder.stages.0"),
    ("ConvNextForImageClassification", CONVNEXT, IMAGES, "convnext.encoder.stages.0"),
    ("ConvNextModel", CONVNEXT, IMAGES, "encoder.stages.0"),
    ("BertForSequenceClassification", BERT, TEXT, "bert.encoder.layer.0"),
    ("BertForSequenceClassification", BERT, TEXT | {"labels": torch.tensor([0, 1, 1])},
     "bert.encoder.layer.0"),
    ("BertForMaskedLM", BERT, TEXT, "bert.encoder.layer.0"),
    ("BertModel", BERT, TEXT, "encoder.layer.0"),
    ("GPT2LMHeadModel", GPT2, TOKENS, "transformer.h.0"),
    ("GPT2ForSequenceClassification", GPT2 | {"pad_token_id": 0}, TEXT, "transformer.h.0"),
    ("GPT2Model", GPT2, LEFT, "h.0"),
    ("LlamaForCausalLM", LLAMA, LEFT, "model.layers.0"),
    ("LlamaForCausalLM", LLAMA, (TOKENS, PADDED), "model.layers.0"),
    ("LlamaForCausalLM", LLAMA, TEXT | {"labels": TOKENS, "use_cache": False}, "model.layers.0"),
    ("LlamaForSequenceClassification", LLAMA, TEXT, "model.layers.0"),
    ("LlamaModel", LLAMA, TOKENS, "layers.0"),
    ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "output_router_logits": True}, TEXT,
     "model.layers.0"),
    ("T5EncoderModel", T5, TEXT, "encoder.block.0"),
    ("T5ForConditionalGeneration", T5, TEXT | {"labels": TOKENS}, "decoder.block.0"),
    ("DistilBertForSequenceClassification", DISTILBERT, TEXT, "distilbert.transformer.layer.0"),
    ("SwinForImageClassification", SWIN, IMAGES, "swin.encoder.layers.0"),
    ("Qwen2ForCausalLM", LLAMA, TEXT, "model.layers.0"),
    ("OPTForCausalLM", OPT, TEXT, "model.decoder.layers.0"),
    ("AlbertForSequenceClassification", BERT | {"embedding_size": 8, "hidden_dropout_prob": 0.1},
     TEXT, "albert.encoder.albert_layer_groups.0"),
]


def pretrained(kind: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, kind)
    return made(made.config_class(**options))


@pytest.mark.parametrize(("kind", "options", "x", "name"), FAMILIES,
                         ids=[f"{f[0]}-{i}" for i, f in enumerate(FAMILIES)])
def test_pretrained(kind: str, options: dict[str, Any], x: Any, name: str) -> None:
    model = pretrained(kind, **options)
    net = nw.stages(model, x)
    assert net.names[0] == name
    assert len(set(net.names)) == len(net) == 3
    assert_same(net, x)
    local_step(net, x)


@pytest.mark.parametrize(("kind", "options"), [
    ("ViTForImageClassification", VIT), ("BertModel", BERT), ("LlamaForCausalLM", LLAMA),
    ("GPT2LMHeadModel", GPT2), ("ConvNextModel", CONVNEXT), ("T5ForConditionalGeneration", T5)])
def test_pretrained_needs_no_example(kind: str, options: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    model = pretrained(kind, **options)
    torch.set_rng_state(state)
    assert len(nw.stages(model)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_pretrained_of_unknown_input_needs_an_example() -> None:
    model = pretrained("LlamaForCausalLM", **LLAMA)
    model.main_input_name = "input_values"
    with pytest.raises(CannotStage, match=r"input_values.*example="):
        nw.stages(model)


def test_padding_is_honoured() -> None:
    for kind, options in (("BertForSequenceClassification", BERT), ("LlamaForCausalLM", LLAMA)):
        net = nw.stages(pretrained(kind, **options).eval())
        other = TEXT | {"input_ids": torch.where(PADDED == 0, 49, TOKENS)}
        outputs = [net(x)[:, :3] if kind.startswith("Llama") else net(x) for x in (TEXT, other)]
        torch.testing.assert_close(*outputs)
        unmasked = net({"input_ids": TOKENS})
        assert not torch.allclose(unmasked, net(TEXT))


def test_tied_parameters_are_counted_in_both_stages() -> None:
    net = nw.stages(pretrained("GPT2LMHeadModel", **GPT2))
    tied = net.model.lm_head.weight
    assert tied is net.model.transformer.wte.weight
    assert [any(p is tied for p in stage.parameters()) for stage in net] == [True, False, True]
    assert any(p is net.model.transformer.wpe.weight for p in net.parameters(0))


def test_loose_parameters_belong_to_a_stage_even_when_frozen() -> None:
    model = pretrained("ViTForImageClassification", **VIT).requires_grad_(False)
    net = nw.stages(model)
    used = {id(p) for stage in net for p in stage.parameters()}
    assert all(id(p) in used for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_last_stage_may_be_run_again() -> None:
    """A cache that every run extended would change the second result, or fail."""
    net = nw.stages(pretrained("LlamaForCausalLM", **LLAMA).eval())
    context = net.context(LEFT)
    h = torch.randn(3, 7, 16)
    for stage in net[1], net[2]:
        first = stage(h, context)
        assert torch.equal(stage(h, context), first)
        assert not torch.equal(stage(h + 1, context), first)
    assert torch.equal(net(LEFT), net.model(**LEFT).logits)


def test_context_holds_no_graph() -> None:
    net = nw.stages(pretrained("T5EncoderModel", **T5))
    context = net.context(TEXT)
    net[0](TEXT, context)
    live = net.context(TEXT, live=True)
    net[0](TEXT, live)
    (_, masks), (_, live_masks) = context.arguments[0], live.arguments[0]
    assert not any(v.requires_grad for v in masks.values() if isinstance(v, Tensor))
    held = [*live.arguments[0][0], *live_masks.values()]
    assert any(v.requires_grad for v in held if isinstance(v, Tensor))  # the position bias


def test_gradient_checkpointing() -> None:
    model = pretrained("BertForSequenceClassification", **BERT)
    model.gradient_checkpointing_enable()
    assert_same(nw.stages(model, TEXT), TEXT)


def test_pretrained_given_a_cache() -> None:
    cache = pytest.importorskip("transformers").DynamicCache()
    net = nw.stages(pretrained("LlamaForCausalLM", **LLAMA))
    with pytest.raises(CannotStage, match="past_key_values"):
        net(TEXT | {"past_key_values": cache})
    with pytest.raises(CannotStage, match="cache 3, which a stage"):
        net((TOKENS, None, None, cache))


def test_draws_between_the_layers() -> None:
    """The decision whether to drop a layer is drawn even where no layer is dropped."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if torch.empty(1).bernoulli_(0.5) < 0:
                    continue
                x = layer(x)
            return x

    net = nw.stages(Dropping(), x := torch.randn(2, 4))
    assert net.names == ["layers.0", "layers.1", "layers.2"]
    assert_same(net, x)


def test_pretrained_that_drops_layers() -> None:
    model = pretrained("OPTForCausalLM", **OPT, layerdrop=0.9)
    with pytest.raises(CannotStage, match="layerdrop"):
        nw.stages(model)


def test_cuts_inside_a_pretrained_model() -> None:
    net = nw.stages(pretrained("ResNetModel", **RESNET), IMAGES, cuts=[
        "encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.2"])
    assert_same(net, IMAGES)
    with pytest.raises(CannotStage, match=r"mlp leads to.*try cuts=\['model.layers.0'"):
        nw.stages(pretrained("LlamaForCausalLM", **LLAMA),
                  cuts=["model.layers.0.mlp", "model.layers.1"])


def test_module_around_a_pretrained_model() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = pretrained("BertModel", **BERT), nn.Linear(16, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.body(input_ids, attention_mask).last_hidden_state)

    net = nw.stages(Tagger(), TEXT)
    assert net.names[:4] == ["body.embeddings", *(f"body.encoder.layer.{i}" for i in range(3))]
    assert_same(net, TEXT)


class SeveralOutputs(nn.Module):
    """Two heads on one body; `form` makes the output of both."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.middle = nn.Linear(8, 16), nn.Linear(16, 16)
        self.first, self.second, self.form = nn.Linear(16, 3), nn.Linear(16, 1), form

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.middle(torch.tanh(self.body(x))))
        return self.form(self.first(h), self.second(h))


@pytest.mark.parametrize("form", [
    lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"logits": a, "value": b},
    lambda a, b: (a, {"value": [b]}), lambda a, b: (a, None)],
    ids=["tuple", "list", "dict", "nested", "none"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_several_outputs_are_staged_by_the_one_that_is_meant(form, wrapped):
    model: nn.Module = SeveralOutputs(form)
    if wrapped:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), model)
    x = torch.randn(4, 8)
    net = nw.stages(model, x)
    assert len(net) > 1
    assert_same(net, x)


def test_several_outputs_without_one_that_is_meant_are_refused():
    with pytest.raises(CannotStage, match="returned dict, which has no tensor called logits"):
        nw.stages(SeveralOutputs(lambda a, b: {"first": a, "second": b}), torch.randn(4, 8))


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=20, num_labels=3, pad_token_id=0, use_cache=False))


class LowRank(nn.Module):
    """A linear layer with a branch of two small ones, as adapters have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Around(nn.Module):
    """Calls another model by its arguments' names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_adapters_around_a_model_leave_it_the_models_own_chain():
    model = tiny_llama()
    expected = nw.stages(model, {"input_ids": torch.randint(1, 20, (2, 5))}).names
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
    x = {"input_ids": torch.randint(1, 20, (2, 5))}
    net = nw.stages(Around(model), x)
    assert net.names == [f"model.{name}" for name in expected]
    assert_same(net, x)


def test_two_towers_in_a_module_are_staged():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8))
    x = {"pixel_values": torch.randn(4, 3, 16, 16), "input_ids": torch.randint(3, 20, (4, 7))}

    class Image(Around):
        def forward(self, **given: Tensor) -> Tensor:
            return self.model(**given).logits_per_image

    net = nw.stages(Image(model), x)
    assert len(net) > 1
    assert_same(net, x)


class Classifier(nn.Module):
    """A backbone, and a head that is given what it returned for the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = pretrained("GPT2Model", **GPT2), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone(tokens)[0][:, -1])


STACKS: dict[str, Callable[..., nn.Module]] = {
    "coupling": nw.reshape.reversible,
    "momentum": lambda model, x: nw.reshape.reversible(model, x, how="momentum"),
    "parallel": nw.reshape.parallelize_residual,
    "pairs": lambda model, x: nw.reshape.parallelize_residual(model, x, group=2),
}
STACKED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "sequential": (lambda: nw.models.gpt(50, context=8, width=16, depth=3, heads=2), TOKENS),
    "pretrained": (lambda: pretrained("LlamaForCausalLM", **LLAMA), TEXT),
    "convolutional": (
        lambda: pretrained("ResNetModel", **RESNET | {"hidden_sizes": [8, 16], "depths": [3, 3]}),
        {"pixel_values": IMAGES["pixel_values"].double()},
    ),
    "backbone and head": (Classifier, TOKENS),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("network", STACKED)
def test_a_chain_leads_through_stacks_of_blocks(network: str, stack: str) -> None:
    make, x = STACKED[network]
    model = make().double()
    changed = STACKS[stack](model, x)
    net = nw.stages(changed, x)
    assert len(net) == len(nw.stages(model, x))
    assert any(".blocks.1" in name for name in net.names)
    assert_same(net, x, exact=False)


def test_cuts_inside_a_stack() -> None:
    changed = nw.reshape.reversible(pretrained("LlamaForCausalLM", **LLAMA), TEXT)
    inner = [f"model.layers.0.blocks.{i}" for i in (1, 2)]
    net = nw.stages(changed, TEXT, cuts=inner)
    assert net.names == inner
    assert_same(net, TEXT, exact=False)
    assert nw.stages(changed, TEXT, cuts=["model.layers.0"]).names == ["model.layers.0"]


def test_a_chain_through_stacks_is_copied_with_its_model() -> None:
    changed = nw.reshape.parallelize_residual(nw.models.gpt(50, context=8, depth=3), TOKENS)
    net = nw.stages(changed, TOKENS)
    other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert_same(other, TOKENS, exact=False)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}


def test_a_local_rule_teaches_each_block_of_a_stack() -> None:
    network = nw.models.gpt(50, context=8, width=16, depth=3, heads=2)
    rule = nw.rules.MonoForward(nw.reshape.reversible(network, TOKENS), TOKENS)
    rule(TOKENS, TOKENS)
    assert all(
        p.grad is not None and p.grad.any()
        for name, p in rule.network.named_parameters()
        if "blocks" in name and "bias" not in name
    )


def test_convolutional_networks_are_cut_within_their_resolutions() -> None:
    net = nw.stages(
        pretrained(
            "ResNetForImageClassification", **RESNET | {"hidden_sizes": [8, 16], "depths": [2, 2]}
        ),
        IMAGES,
    )
    assert [name.partition("encoder.")[2] for name in net.names if "encoder" in name] == [
        f"stages.{i}.layers.{k}" for i in range(2) for k in range(2)
    ]
    assert_same(net, IMAGES)
