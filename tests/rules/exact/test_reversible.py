from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.reversible import (
    Add,
    AdditiveCoupling,
    AffineCoupling,
    ReversibleBlock,
    ReversibleSequential,
    ReversibleUNet,
)
from netwright.data import digits
from netwright.errors import CannotReverse
from netwright.measure import cost
from netwright.models import gpt, mlp
from netwright.rules import Backprop, Reversible

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()

ONCE = {"repeats": 1, "warmup": 0}


def half(width=4, *, dropout=0.0):
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(),
                         nn.Dropout(dropout), nn.Linear(width, width))


def coupling(width=4, *, dropout=0.0):
    return AdditiveCoupling(half(width, dropout=dropout), half(width, dropout=dropout))


def convolution():
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())


def step(rule, x, y, *, autocast=False):
    rule.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = rule(x, y)
    return (loss, {name: p.grad for name, p in rule.network.named_parameters()
                   if p.grad is not None}, dict(rule.network.named_buffers()))


def assert_as_backprop(model, x, y, *, rtol=1e-10, atol=1e-12, autocast=False,
                       **options):
    """Two steps of each, so that the second also sees the first one's running statistics."""
    theirs, rule = Backprop(deepcopy(model)), Reversible(model, **{"example": x, **options})
    for _ in range(2):
        exact = step(theirs, x, y, autocast=autocast)
        ours = step(rule, x, y, autocast=autocast)
        torch.testing.assert_close(ours[0], exact[0], rtol=rtol, atol=atol)
        assert ours[1].keys() == exact[1].keys() != set()
        for found, expected in zip(ours[1:], exact[1:], strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol,
                                           msg=lambda text, name=name: name + text)
    return rule


def mixed():
    """Runs of couplings between ordinary layers, everywhere with dropout and batch norm."""
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), coupling(dropout=0.3), nn.ReLU(), nn.Dropout(0.3),
        coupling(), coupling(dropout=0.3), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.3),
        nn.Linear(12, 8), nn.Tanh(), AffineCoupling(nn.Linear(4, 8), nn.Linear(4, 8)),
        nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Dropout2d(0.2), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 3)).double()


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=8, patch_size=4, num_channels=1, num_labels=3,
            hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        return (transformers.ViTForImageClassification(config).double(),
                {"pixel_values": IMAGES}, Y)
    ids = torch.randint(1, 20, (6, 7))
    mask = torch.ones_like(ids)
    ids[:3, 5:], mask[:3, 5:] = 0, 0
    config = getattr(transformers, f"{name}Config")(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_labels=3, pad_token_id=0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model.double(), {"input_ids": ids, "attention_mask": mask}, Y


def t5():
    """Its first layer's position bias reaches the others beside the signal, with a gradient."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=4, num_heads=2))
    return (model.double(), {"input_ids": torch.randint(1, 20, (6, 5))},
            torch.randint(8, (6, 5)))


def graph():
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    return (geometric.GCN(5, 8, num_layers=4, out_channels=3, dropout=0.2, norm="batch").double(),
            (X, edges), torch.where(torch.arange(6) < 4, Y, -100))


NETWORKS = {
    "couplings": lambda: (nn.Sequential(nn.Linear(5, 8), *[coupling() for _ in range(6)],
                                        nn.Linear(8, 3)).double(), X, Y),
    "couplings alone": lambda: (nn.Sequential(*[coupling() for _ in range(3)]).double(),
                                X.repeat(1, 2)[:, :8], Y),
    "mixed": lambda: (mixed(), X, Y),
    "sequential inside": lambda: (nn.Sequential(
        nn.Linear(5, 8), ReversibleSequential(coupling(), coupling(dropout=0.3)), nn.Tanh(),
        nn.Linear(8, 8), nn.Linear(8, 3)).double(), X, Y),
    "convolutions": lambda: (nn.Sequential(
        nn.Conv2d(1, 4, 3), AdditiveCoupling(convolution(), convolution()),
        AdditiveCoupling(convolution(), convolution()), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 3)).double(), IMAGES, Y),
    "mlp": lambda: (mlp(5, 3, hidden=(8, 7, 6)).double(), X, Y),
    "cnn": lambda: (cnn(), IMAGES, Y),
    "gpt": lambda: (gpt(20, 8, width=16, depth=3).double(), torch.randint(20, (3, 8)),
                    torch.randint(20, (3, 8))),
    "vit": lambda: hugging_face("ViT"),
    "bert": lambda: hugging_face("Bert"),
    "llama": lambda: hugging_face("Llama"),
    "t5": t5,
    "graph": graph,
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "kept"])
def test_gradients_and_running_statistics_are_those_of_backward(make, checkpoint):
    torch.manual_seed(0)
    assert_as_backprop(*make(), checkpoint=checkpoint)


def test_a_whole_network_may_be_reversible():
    torch.manual_seed(0)
    network = ReversibleSequential(*[coupling(dropout=0.3) for _ in range(4)]).double()
    x = torch.randn(6, 8).double()
    assert_as_backprop(network, x, Y)
    assert_as_backprop(network, (x,), Y)
    assert_as_backprop(network, {"x": x}, Y)


class Shifted(ReversibleBlock):
    """Adds to each of two streams a layer of the other, and of one more argument."""

    streams = None

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Bilinear(4, 4, 4), nn.Bilinear(4, 4, 4)

    def updates(self, *args, **options):
        return [Add("f", self.f, [1], 0, args, options), Add("g", self.g, [0], 1, args, options)]


class Joined(nn.Module):

    def forward(self, streams):
        return torch.cat(streams, 1)


class Parted(nn.Module):

    def forward(self, h):
        return tuple(h.chunk(2, 1))


def test_more_arguments_reach_every_block_of_a_reversible_network():
    torch.manual_seed(0)
    x = {"x": (torch.randn(6, 4).double(), torch.randn(6, 4).double()),
         "input2": torch.randn(6, 4).double()}
    assert_as_backprop(ReversibleSequential(Shifted(), Shifted()).double(), x, Y)


def test_several_streams_pass_between_ordinary_layers():
    torch.manual_seed(0)

    class Plain(Shifted):
        def __init__(self):
            super().__init__()
            self.f, self.g = half(), half()

    network = nn.Sequential(nn.Linear(5, 8), Parted(), Plain(), Plain(), Joined(),
                            nn.Linear(8, 8), nn.Linear(8, 3)).double()
    assert_as_backprop(network, X, Y)
    a, b = X[:, :4].clone(), X[:, 1:].clone()
    network = nn.Sequential(Plain(), Joined(), nn.Linear(8, 3)).double()
    assert_as_backprop(network, ((a, b),), Y, example=None)
    with pytest.raises(ValueError, match=r"the one argument of an nn.Sequential, got 2"):
        Reversible(network)((a, b), Y)
    between = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), Parted(), Plain(), Joined(),
                            nn.Linear(8, 3)).double()
    with pytest.raises(CannotReverse, match=r"Parted of stage '1' returned tuple"):
        Reversible(between)(X, Y)
    assert all(p.grad is None for p in between.parameters())
    assert_as_backprop(between, X, Y, checkpoint=False)


def test_a_layer_with_weights_may_take_several_streams():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Bilinear(4, 4, 8)

        def forward(self, streams):
            return self.both(*streams)

    torch.manual_seed(0)
    assert_as_backprop(nn.Sequential(nn.Linear(5, 8), Parted(), Weighted(), nn.Tanh(),
                                     nn.Linear(8, 8), nn.Linear(8, 3)).double(), X, Y)


def test_a_sequential_that_keeps_its_rounding_is_run_so():
    network = nn.Sequential(nn.Linear(5, 8), ReversibleSequential(coupling(), exact=True),
                            nn.Linear(8, 3))
    assert Reversible(network).exact
    assert not Reversible(deep(2)).exact


def test_one_block_in_two_places_gets_the_sum():
    torch.manual_seed(0)
    shared, layer = coupling(), nn.Linear(8, 8)
    assert_as_backprop(nn.Sequential(nn.Linear(5, 8), shared, layer, shared, layer, shared,
                                     nn.Linear(8, 3)).double(), X, Y)


@pytest.mark.parametrize("frozen", [[0], [0, 1], [1, 2], [2], [3], [0, 1, 2], [1, 2, 3]])
def test_frozen_layers_stay_and_the_others_learn_alike(frozen):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), coupling(), coupling(dropout=0.2),
                            nn.Linear(8, 3)).double()
    for i in frozen:
        network[i].requires_grad_(False)
    assert_as_backprop(network, X, Y)
    assert all(p.grad is None for i in frozen for p in network[i].parameters())


def test_under_autocast_gradients_are_near_those_of_backward():
    torch.manual_seed(0)
    network = mixed().float()
    network.eval()  # batch norm would turn rounding of small variances into differences
    assert_as_backprop(network, X.float(), Y, rtol=0.05, atol=0.02, autocast=True)


def deep(pairs, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 2 * width), *[coupling(width) for _ in range(pairs)],
                         nn.Linear(2 * width, 3))


def test_exact_reconstruction_gives_the_very_bits():
    network, x = deep(24), X.float()
    gradients = {}
    for name, rule in {"backprop": Backprop(network), "exact": Reversible(network, exact=True),
                       "rounded": Reversible(network)}.items():
        network.load_state_dict(deep(24).state_dict())
        gradients[name] = step(rule, x, Y)[1]
    theirs = gradients["backprop"]
    assert all(torch.equal(theirs[name], g) for name, g in gradients["exact"].items())
    assert not all(torch.equal(theirs[name], g) for name, g in gradients["rounded"].items())
    scale = max(g.abs().max() for g in theirs.values())
    for name, g in gradients["rounded"].items():
        assert (g - theirs[name]).abs().max() < 1e-5 * scale, name


def test_memory_is_flat_in_depth_where_layers_are_reversible():
    batch = X.float().repeat(20, 1), Y.repeat(20)
    ours = [cost(Reversible(deep(n)), batch, **ONCE) for n in (3, 15)]
    theirs = [cost(Backprop(deep(n)), batch, **ONCE) for n in (3, 15)]
    assert ours[1].saved_bytes <= 1.05 * ours[0].saved_bytes
    assert ours[1].working_bytes <= 1.05 * ours[0].working_bytes
    assert theirs[1].saved_bytes > 4 * theirs[0].saved_bytes
    assert theirs[0].saved_bytes > 2 * ours[0].saved_bytes


def test_a_layer_without_weights_after_a_block_stops_no_reconstruction():
    def network(n):
        torch.manual_seed(0)
        blocks = [part for _ in range(n) for part in (coupling(32), nn.Identity())]
        return nn.Sequential(nn.Linear(5, 64), *blocks, nn.Linear(64, 3))

    batch = X.float().repeat(20, 1), Y.repeat(20)
    signal = 120 * 64 * 4
    few, many = (cost(Reversible(network(n)), batch, **ONCE).saved_bytes
                 for n in (3, 9))
    assert many - few <= 6 * signal  # the input of each of those layers, and nothing of a block
    plain = cost(Backprop(network(9)), batch, **ONCE).saved_bytes
    assert many < plain / 2


def test_ordinary_layers_keep_their_inputs_alone():
    def network(n):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16, bias=False,
                                elementwise_affine=False), nn.Softplus()) for _ in range(n)]
        return nn.Sequential(nn.Linear(5, 16), *stages, nn.Linear(16, 3))

    batch = X.float().repeat(20, 1), Y.repeat(20)
    kept, stored = ([cost(Reversible(network(n), checkpoint=checkpoint), batch, **ONCE).saved_bytes
                     for n in (3, 9)] for checkpoint in (True, False))
    assert kept[1] - kept[0] <= 6 * 120 * 16 * 4
    assert stored[1] - stored[0] >= 3 * (kept[1] - kept[0])


def test_a_network_that_is_no_sequential_keeps_its_reversible_parts():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 8)
            self.body = ReversibleSequential(*[coupling() for _ in range(8)])
            self.middle = nn.Linear(8, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.middle(self.body(self.first(x)).relu()).tanh())

    torch.manual_seed(0)
    assert_as_backprop(Network().double(), X, Y)


def test_a_network_that_is_no_chain_runs_as_it_is():
    torch.manual_seed(0)
    network = ReversibleUNet(1, 3, widths=(8, 16, 32), depths=(1, 1, 1), dims=1, expand=2)
    x, y = torch.randn(2, 1, 16).double(), torch.randint(3, (2, 16))
    theirs, rule = Backprop(deepcopy(network).double(), loss=nn.functional.cross_entropy), \
        Reversible(network.double(), x, loss=nn.functional.cross_entropy)
    assert rule.stages is None
    torch.testing.assert_close(rule(x, y), theirs(x, y))
    for p, q in zip(network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_learns_what_frozen_hidden_layers_do_not():
    split = digits()
    x, y = split.x_train.flatten(1), split.y_train

    def network():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), coupling(16), coupling(16),
                             nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10))

    def train(network, labels):
        rule = Reversible(network)
        optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(50):
            batch = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            rule(x[batch], labels[batch])
            optimizer.step()
        scores = rule.predict(split.x_test.flatten(1))
        return (scores.argmax(1) == split.y_test).float().mean().item()

    torch.manual_seed(0)
    frozen = network()
    frozen[:-1].requires_grad_(False)
    learned = train(network(), y)
    assert learned > 0.8
    assert learned > train(frozen, y) + 0.1
    assert train(network(), y[torch.randperm(len(y))]) < 0.35


class Forgets(nn.Module):
    """Says that it can be undone, and cannot."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, h):
        return self.layer(h).relu()

    def inverse(self, h):
        return h


def test_errors_name_the_stage_and_leave_everything_as_it_was():
    torch.manual_seed(0)

    def refused(network, match, x=X, y=Y, error=CannotReverse):
        network = network.double()
        rule = Reversible(network)
        before = {name: value.clone() for name, value in rule.state_dict().items()}
        with pytest.raises(error, match=match):
            rule(x, y)
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(value, before[name])
                   for name, value in rule.state_dict().items() if "running" not in name
                   and "tracked" not in name)

    def around(module):
        return nn.Sequential(nn.Linear(5, 8), module, nn.Linear(8, 3))

    refused(around(Forgets()), "Forgets of stage '1' is not invertible here")
    refused(around(AdditiveCoupling(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
                                    nn.Linear(4, 4))), "f of stage '1' changes its input in place")
    refused(nn.Sequential(nn.Linear(5, 7), coupling(), nn.Linear(7, 3)),
            "stage '1': AdditiveCoupling splits its input into 2 equal parts .* has 7 entries")
    refused(around(AffineCoupling(scaled(-900.0), clamp=None)), "f of stage '1' is not invertible")
    refused(around(coupling()).requires_grad_(False), "no trainable parameters", error=ValueError)
    refused(around(coupling()), "between 0 and 2", y=Y + 1, error=ValueError)


def scaled(bias):
    layer = nn.Linear(4, 8)
    nn.init.constant_(layer.bias, bias)
    return layer


def test_what_is_no_longer_finite_when_it_is_reconstructed_is_named():
    layer = scaled(0.0)
    rule = Reversible(nn.Sequential(nn.Linear(5, 8), AffineCoupling(layer, clamp=None),
                                    nn.Linear(8, 3)).double())
    rule(X, Y)
    rule.zero_grad()
    nn.init.constant_(layer.bias, -900.0)  # a scale that float64 cannot take back
    with pytest.raises(CannotReverse, match="f of stage '1' was given is no longer finite"):
        rule(X, Y)
    assert all(p.grad is None for p in rule.parameters())


def test_predictions_and_names_are_the_networks_own():
    torch.manual_seed(0)
    network = mixed()
    rule = Reversible(network)
    rule(X, Y)
    assert torch.equal(rule.predict(X), network.eval()(X))
    assert list(rule.state_dict()) == [f"network.{name}" for name in network.state_dict()]
    assert nw.rules.Reversible is Reversible
