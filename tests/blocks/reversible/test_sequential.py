import copy
import pickle
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from netwright.blocks.reversible import AdditiveCoupling, AffineCoupling, ReversibleSequential
from netwright.errors import CannotReverse
from netwright.measure import cost
from netwright.runtime.random_state import random_state


def dense(c, out=None):
    return nn.Sequential(nn.Linear(c, 2 * c), nn.BatchNorm1d(2 * c), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(2 * c, out or c))


def convolution(d):
    conv, norm = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[d], (None, nn.BatchNorm1d, nn.BatchNorm2d,
                                                              nn.BatchNorm3d)[d]
    drop = (None, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[d]

    def half(c, out=None):
        return nn.Sequential(conv(c, c, 3, padding=1), norm(c), nn.Tanh(), drop(0.3),
                             conv(c, out or c, 3, padding=1))
    return half


class Attention(nn.Module):
    def __init__(self, c, out=None):
        super().__init__()
        self.attend = nn.MultiheadAttention(c, 2, dropout=0.3, batch_first=True)
        self.norm, self.out = nn.LayerNorm(c), nn.Linear(c, out or c)

    def forward(self, x):
        x = self.norm(x)
        return self.out(self.attend(x, x, x, need_weights=False)[0])


def stateful(c, out=None):
    return nn.Sequential(spectral_norm(nn.Conv2d(c, c, 1)),
                         nn.InstanceNorm2d(c, affine=True, track_running_stats=True), nn.Tanh(),
                         nn.Conv2d(c, out or c, 1))


# name: (what makes a half, the size of an input, the dimension that is split)
KINDS = {
    "dense": (dense, (6, 8), 1),
    "1-D": (convolution(1), (3, 8, 7), 1),
    "2-D": (convolution(2), (3, 8, 5, 6), 1),
    "3-D": (convolution(3), (2, 8, 3, 4, 5), 1),
    "sequence": (Attention, (3, 5, 8), -1),
    "stateful": (stateful, (3, 8, 4, 4), 1),
}


def additive(kind, depth=3):
    half, _, dim = KINDS[kind]
    return [AdditiveCoupling(half(4), half(4), dim) for _ in range(depth)]


def affine(kind, depth=3):
    half, _, dim = KINDS[kind]
    return [AffineCoupling(half(4, 8), half(4, 8), dim) for _ in range(depth)]


def twins(blocks, dtype=torch.float64, **options):
    """The same modules, reversible and under plain autograd."""
    blocks = [block.to(dtype) for block in blocks]
    return ReversibleSequential(*copy.deepcopy(blocks), **options), nn.Sequential(*blocks)


def learnt(network, x, *args, seed=3, passes=1):
    """Output, gradients and buffers after a step, and the random numbers that come next."""
    torch.manual_seed(seed)
    for _ in range(passes):
        y = network(x, *args)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    found |= dict(network.named_buffers())
    return {**found, "y": y.detach(), "x": x.grad, "next": torch.rand(3)}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        if theirs[name] is None:
            assert ours[name] is None, name
            continue
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {
            "rtol": 1e-10, "atol": 1e-10}), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [additive, affine])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_buffers_are_those_of_plain_autograd(kind, make, training):
    ours, plain = (n.train(training) for n in twins(make(kind)))
    x = torch.randn(KINDS[kind][1], dtype=torch.float64)
    kept = x.clone()
    for needed in (True, False):  # also where the input needs no gradient
        a, b = x.clone().requires_grad_(needed), x.clone().requires_grad_(needed)
        assert_same(learnt(ours, a, passes=2), learnt(plain, b, passes=2))
        assert torch.equal(a, kept)
        ours.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("make", [additive, affine])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse(kind, make):
    x = torch.randn(KINDS[kind][1])
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        network = ReversibleSequential(*make(kind)).to(dtype).eval()
        back = network.inverse(network(x.to(dtype)))
        assert (back - x.to(dtype)).abs().max() < bound
        block = network[0]
        assert (block.inverse(block(x.to(dtype))) - x.to(dtype)).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [additive, affine])
def test_exact_is_bit_for_bit_in_every_dtype(make, dtype):
    ours, plain = twins(make("dense", depth=6), dtype, exact=True)
    x = torch.randn(6, 8).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert_same(learnt(ours, a), learnt(plain, b), rtol=0, atol=0)


def test_without_exact_rounding_shows():  # or the test above could not fail
    ours, plain = twins(additive("dense", depth=6), torch.bfloat16)
    x = torch.randn(6, 8).bfloat16()
    grads = [learnt(network, x)["0.f.0.weight"] for network in (ours, plain)]
    assert not torch.equal(*grads)


@pytest.mark.parametrize("exact", [False, True])
def test_autocast(exact):
    ours, plain = twins(additive("2-D"), torch.float32, exact=exact)
    x = torch.randn(KINDS["2-D"][1])

    def step(network):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        assert y.dtype == torch.float32
        y.square().sum().backward()  # the backward pass is outside of it
        return {name: p.grad for name, p in network.named_parameters()}
    bound = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.02, "atol": 0.05}
    assert_same(step(ours), step(plain), **bound)


def test_autograd_grad_retain_graph_and_accumulation():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)

    def found(network):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        weight = network[1].f[0].weight
        y = network(given).square().sum()
        first = torch.autograd.grad(y, [given, weight], retain_graph=True)
        second = torch.autograd.grad(y, [weight], retain_graph=True)
        assert weight.grad is None
        y.backward()
        network(given).sum().backward()
        return dict(enumerate([*first, *second, *(p.grad for p in network.parameters())]))
    assert_same(found(ours), found(plain))


def test_frozen_and_shared_parameters():
    blocks = additive("dense", 4)
    blocks[2].g = blocks[0].f  # also batch norm's statistics are counted twice
    blocks[3] = blocks[1]
    for p in [*blocks[0].g.parameters(), blocks[1].f[0].weight]:
        p.requires_grad_(False)
    ours, plain = twins(blocks)
    x = torch.randn(6, 8, dtype=torch.float64)
    assert_same(learnt(ours, x), learnt(plain, x))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-14), (torch.float32, 1e-5),
                                              (torch.bfloat16, 0.4)])
def test_rounding_through_many_blocks(dtype, bound):
    def half():
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    network = ReversibleSequential(*[AdditiveCoupling(half(), half()) for _ in range(64)]).to(dtype)
    x, seen = torch.randn(16, 16).to(dtype), []
    network(x)
    network[0].f.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    network(x).square().mean().backward()
    there, back = seen
    assert 0 < (back - there).norm() / there.norm() < bound


def test_what_comes_before_the_first_gradient_is_not_reconstructed():
    blocks = additive("dense", 4)
    for p in [*blocks[0].parameters(), *blocks[1].parameters()]:
        p.requires_grad_(False)
    ours, plain = twins(blocks)
    x = torch.randn(6, 8, dtype=torch.float64)
    assert_same(learnt(ours, x), learnt(plain, x))
    calls = []
    ours[1].f.register_forward_hook(lambda *_: calls.append(1))
    ours(x).sum().backward()
    assert len(calls) == 1


def test_all_frozen_gives_the_input_its_gradient():
    ours, plain = twins(additive("dense"))
    for network in (ours, plain):
        network.requires_grad_(False).eval()
    a, b = (torch.ones(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert_same(learnt(ours, a), learnt(plain, b))


class Asks(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear = nn.Linear(c, c)

    def forward(self, x, scale, mask=None, times=1):
        x = torch.tanh(self.linear(x)) * scale * times
        return x if mask is None else x.masked_fill(mask, 0)


def test_further_arguments_and_their_gradients():
    blocks = [AdditiveCoupling(Asks(4), Asks(4)).double() for _ in range(3)]
    ours = ReversibleSequential(*copy.deepcopy(blocks))
    x = torch.randn(6, 8, dtype=torch.float64)
    mask = torch.rand(6, 4) > 0.5

    def plain(x, *args, **options):
        for block in blocks:
            x = block(x, *args, **options)
        return x

    def step(network):
        leaf = torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
        scale = leaf * 2  # no leaf itself, and its hooks are called once
        scale.retain_grad()
        scale.register_hook(lambda g: g * 3)
        network(x, scale, mask=mask, times=2).square().sum().backward()
        network(x, scale.detach(), None).square().sum().backward()
        return {"scale": scale.grad, "leaf": leaf.grad}
    assert_same(step(ours), step(plain))
    assert_same(dict(enumerate(p.grad for p in ours.parameters())),
                dict(enumerate(p.grad for block in blocks for p in block.parameters())))


def test_hooks_on_parameters_are_called_once():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)
    calls = []
    for network in (ours, plain):
        network[1].f[0].weight.register_hook(lambda g: g * 2)
        network[1].f[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    assert_same(learnt(ours, x), learnt(plain, x))
    assert len(calls) == 2
    assert ours[1].f[0].weight._backward_hooks  # they are still there


def test_hooks_on_modules():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)
    seen = []
    for network in (ours, plain):
        network[1].g[0].register_forward_hook(lambda m, i, o: o * 2)
        network[1].f.register_full_backward_hook(lambda m, i, o: seen.append(o[0]))
        network[2].register_forward_hook(lambda m, i, o: calls.append(m) or o + 1)  # on a block
    calls = []
    assert_same(learnt(ours, x), learnt(plain, x))
    assert calls == [ours[2], ours[2], plain[2]]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)


def test_nested():
    half = nn.Sequential(nn.Linear(4, 4), ReversibleSequential(*[
        AdditiveCoupling(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.4)))
        for _ in range(2)]))
    blocks = [ReversibleSequential(*additive("dense", 2)), AdditiveCoupling(half, dense(4)),
              ReversibleSequential(*affine("dense", 2))]
    ours, _ = twins(blocks)

    def opened(module):
        for name, child in module.named_children():
            opened(child)
            if isinstance(child, ReversibleSequential):
                setattr(module, name, nn.Sequential(*child))
        return module
    plain = opened(nn.Sequential(*copy.deepcopy(list(ours))))
    x = torch.randn(6, 8, dtype=torch.float64)
    assert_same(learnt(ours, x), learnt(plain, x))


def test_two_forward_passes_before_a_backward():
    ours, plain = twins(additive("stateful"))
    x = torch.randn(KINDS["stateful"][1], dtype=torch.float64)

    def step(network):
        torch.manual_seed(0)
        first, second = network(x).square().sum(), network(2 * x).sum()
        first.backward()
        second.backward()
        return {**{n: p.grad for n, p in network.named_parameters()},
                **dict(network.named_buffers())}

    ours_found, theirs = step(ours), step(ReversibleSequential(*plain, exact=True))
    assert_same(ours_found, theirs)


def test_mode_changed_before_the_backward_pass():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)

    def step(network):
        torch.manual_seed(0)
        y = network(x).square().sum()
        network.eval()
        y.backward()
        assert not any(module.training for module in network.modules())
        return {n: p.grad for n, p in network.named_parameters()}
    assert_same(step(ours), step(plain))


def test_transforms_of_torch_func():
    ours, plain = (n.eval() for n in twins(additive("dense")))
    x = torch.randn(6, 8, dtype=torch.float64)
    weights = dict(plain.named_parameters())

    def loss(network):
        return lambda given, x: torch.func.functional_call(network, given, (x,)).square().sum()
    assert_same(torch.func.grad(loss(ours))(weights, x), torch.func.grad(loss(plain))(weights, x))
    each = torch.func.vmap(lambda row: ours(row[None])[0])
    torch.testing.assert_close(each(x), plain(x))
    for network in (ours, plain):
        network.requires_grad_(False)
    tangents = [torch.func.jvp(network, (x,), (x.cos(),))[1] for network in (ours, plain)]
    torch.testing.assert_close(*tangents)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
    torch.testing.assert_close(tangent, tangents[1])


def test_functional_call_under_plain_autograd():
    ours, plain = (n.eval() for n in twins(additive("dense")))
    x = torch.randn(6, 8, dtype=torch.float64)
    found = []
    for network in (ours, plain):
        given = {n: (p.detach() * 2).requires_grad_() for n, p in plain.named_parameters()}
        torch.func.functional_call(network, given, (x,)).square().sum().backward()
        found.append({n: p.grad for n, p in given.items()})
    assert_same(*found)


def test_inference_and_no_grad():
    ours, plain = (n.eval() for n in twins(additive("dense")))
    x = torch.randn(6, 8, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x))
    with torch.no_grad():
        assert not ours(x).requires_grad


def test_copies_pickles_and_state():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)
    learnt(ours, x)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    ours.zero_grad()
    expected = learnt(plain, x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        assert_same(learnt(again, x), expected)
    assert isinstance(ours[1:], ReversibleSequential)


@pytest.mark.filterwarnings("ignore")
def test_compile_breaks_the_graph_and_says_why():
    ours, plain = (n.eval() for n in twins(additive("dense", 2)))
    x = torch.randn(6, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same({n: p.grad for n, p in ours.named_parameters()},
                {n: p.grad for n, p in plain.named_parameters()})
    torch._dynamo.reset()
    with pytest.raises(Exception, match="reconstruction runs modules inside a backward pass"):
        torch.compile(ours, backend="eager", fullgraph=True)(x)


def test_channels_last_is_kept():
    ours, plain = twins(additive("2-D"))
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    seen = []
    ours[1].f.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    assert_same(learnt(ours, x), learnt(plain, x))
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in seen)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("what", ["weight", "frozen", "statistics"])
def test_what_changes_before_the_backward_pass_raises(what):
    ours, _ = twins(additive("dense"))
    ours[1].f[0].weight.requires_grad_(what != "frozen")
    ours.train(what != "statistics")
    x = torch.randn(6, 8, dtype=torch.float64)
    y = ours(x)
    loss = y.sum()
    with torch.no_grad():
        {"weight": ours[1].f[0].weight, "frozen": ours[1].f[0].weight,
         "statistics": ours[1].f[1].running_mean}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(p.grad is None for p in ours.parameters())


def test_second_derivatives_raise():
    ours, _ = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(CannotReverse, match=r"differentiated once.*nn\.Sequential"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


def test_the_inputs_storage_lives():
    ours, _ = twins(additive("dense"))
    given = torch.randn(6, 8, dtype=torch.float64)
    x = given * 1
    x.requires_grad_()
    y = ours(x)
    y.sum().backward()
    assert torch.equal(x, given)
    assert y.untyped_storage().nbytes() == x.untyped_storage().nbytes() == 6 * 8 * 8


def test_a_module_that_counts_in_its_buffers_counts_once():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("times", torch.ones(()))

        def forward(self, x):
            self.times = self.times + 1  # a new tensor, where batch norm writes in place
            return self.linear(x) * self.times
    blocks = [AdditiveCoupling(Counts(), Counts()) for _ in range(3)]
    ours, plain = twins(blocks)
    x = torch.randn(6, 8, dtype=torch.float64)
    assert_same(learnt(ours, x, passes=2), learnt(plain, x, passes=2))
    assert ours[0].f.times == 3


def test_empty_batches_and_empty_networks():
    ours, plain = (n.eval() for n in twins(additive("dense")))
    x = torch.zeros(0, 8, dtype=torch.float64)
    assert_same(learnt(ours, x), learnt(plain, x))
    x = torch.randn(2, 3, requires_grad=True)
    y = ReversibleSequential()(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_numbers():
    def half():
        return nn.Linear(4, 4, dtype=torch.complex128)
    blocks = [AdditiveCoupling(half(), half()) for _ in range(3)]
    x = torch.randn(6, 8, dtype=torch.complex128)
    for exact in (False, True):
        ours, plain = twins(blocks, torch.complex128, exact=exact)
        found = []
        for network in (ours, plain):
            network.zero_grad()
            network(x).abs().square().sum().backward()
            found.append({n: p.grad for n, p in network.named_parameters()})
        assert_same(*found)


def test_unused_parts_of_the_output():
    ours, plain = twins(additive("dense", 2))
    x = torch.randn(6, 8, dtype=torch.float64)
    found = []
    for network in (ours, plain):
        torch.manual_seed(0)
        network(x)[:, :4].sum().backward()
        found.append({n: p.grad for n, p in network.named_parameters()})
    found[1] = {n: torch.zeros_like(found[0][n]) if g is None and found[0][n] is not None else g
                for n, g in found[1].items()}
    assert_same(*found)


def test_saved_tensors_may_be_stored_elsewhere():
    ours, plain = twins(additive("dense"), exact=True)
    x = torch.randn(6, 8, dtype=torch.float64)
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()
    found = []
    for network in (ours, plain):
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
            loss = network(x).square().sum()
        loss.backward()
        found.append({n: p.grad for n, p in network.named_parameters()})
    assert packed
    assert_same(*found)


def test_loss_scaling():
    ours, plain = twins(additive("dense"), torch.float32)
    x = torch.randn(6, 8)
    found = []
    for network in (ours, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        torch.manual_seed(0)
        scaler.scale(network(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(dict(network.named_parameters()))
    assert_same(*found, rtol=1e-4, atol=1e-4)


def test_distributed_data_parallel():
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        together = nn.parallel.DistributedDataParallel(ours)
        found = learnt(together, x, passes=2)
    finally:
        torch.distributed.destroy_process_group()
    assert_same({name.removeprefix("module."): t for name, t in found.items()},
                learnt(plain, x, passes=2))


def test_infinite_gradients_are_no_error():
    ours, _ = twins(additive("dense"))
    (ours(torch.randn(6, 8, dtype=torch.float64)) * float("inf")).sum().backward()
    assert not ours[0].f[0].weight.grad.isfinite().all()


def test_stored_bytes_do_not_grow():
    def saved(depth, **options):
        torch.manual_seed(0)
        network = ReversibleSequential(*additive("dense", depth), **options)
        found = cost(network, (torch.randn(64, 8), torch.randint(8, (64,))), repeats=1, warmup=0)
        return found.saved_bytes, found.working_bytes
    few, many = saved(2), saved(8)
    assert many[0] <= 1.05 * few[0]
    assert many[1] <= 1.05 * few[1]
    exact = saved(8, exact=True)[1] - saved(2, exact=True)[1]
    assert 0 < exact <= 6 * 2 * 64 * 4 * 1.1  # about a byte for each number of each step


class Bad(nn.Module):
    """Norm, then what the test wants, so that there is something to put back."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2), *layers)

    def forward(self, x):
        return self.layers(x)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x):
        return x * self.scale

    def inverse(self, y):
        return y / (self.scale + 1)


def additive_with(f):
    return AdditiveCoupling(f, nn.Linear(4, 4))


@pytest.mark.parametrize(("bad", "message"), [
    (lambda: additive_with(nn.Linear(4, 6)), r"f of module '1'.*got \(6, 6\) for \(6, 4\)"),
    (lambda: additive_with(Lambda(lambda x: x[:1])), r"f of module '1'.*got \(1, 4\) for \(6, 4\)"),
    (lambda: additive_with(Lambda(lambda x: x[:, :1])), r"f of module '1'.*\(6, 1\)"),
    (lambda: additive_with(Lambda(lambda x: (x, x))), r"f of module '1'.*tuple"),
    (lambda: AffineCoupling(nn.Linear(4, 4)), r"f of module '1'.*scale and shift"),
    (lambda: AffineCoupling(nn.Linear(4, 8), Lambda(lambda x: x[:1].repeat(1, 2))),
     r"g of module '1'.*scale and shift"),
    (lambda: additive_with(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))),
     r"f of module '1' changes its input in place"),
    (lambda: AdditiveCoupling(nn.Linear(4, 4), nn.ReLU(inplace=True)),
     r"g of module '1' changes its input in place"),
    (Wrong, r"module '1'.*not invertible here"),
    (lambda: AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), dim=2), r"dim=2"),
    (lambda: AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), sizes=(3, 4)), r"\[3, 4\]"),
])
def test_bad_modules_raise_and_leave_all_as_it_was(bad, message):
    torch.manual_seed(0)
    network = ReversibleSequential(
        AdditiveCoupling(Bad(nn.Linear(4, 4)), Bad(nn.Linear(4, 4))), bad())
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    x = torch.randn(6, 8)
    before = copy.deepcopy((network.state_dict(), x))
    random = random_state()[0]
    for _ in range(2):  # it is no better the second time
        with pytest.raises(CannotReverse, match=message):
            network(x)
    after = (network.state_dict(), x)
    assert torch.equal(random_state()[0], random)
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert torch.equal(before[1], x)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())


def test_in_place_is_harmless_on_what_the_module_made_itself():
    def half(inplace):
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 4))
    torch.manual_seed(0)
    plain = nn.Sequential(*[AdditiveCoupling(half(False), half(False)) for _ in range(3)]).double()
    ours = ReversibleSequential(*[AdditiveCoupling(half(True), half(True)) for _ in range(3)])
    ours.double().load_state_dict(plain.state_dict())
    x = torch.randn(6, 8, dtype=torch.float64)
    assert_same(learnt(ours, x), learnt(plain, x))


def test_odd_channels():
    network = ReversibleSequential(*additive("dense", 1))
    with pytest.raises(CannotReverse, match=r"2 equal parts along dim=1, which has 7"):
        network(torch.randn(2, 7))


def test_modules_without_an_inverse():
    with pytest.raises(CannotReverse, match=r"module '1', Linear, has no inverse"):
        ReversibleSequential(*additive("dense", 1), nn.Linear(8, 8))
    network = ReversibleSequential(*additive("dense", 1)).append(nn.Linear(8, 8))
    with pytest.raises(CannotReverse, match=r"module '1', Linear, has no inverse"):
        network(torch.randn(2, 8))


def test_a_wrong_module_is_found_in_training_though_inference_came_first():
    scale = torch.ones(4, requires_grad=True)
    network = ReversibleSequential(additive_with(Lambda(lambda x: x * scale)))
    with torch.no_grad():
        network(torch.randn(2, 8))
    y = network(torch.randn(2, 8))
    with pytest.raises(CannotReverse, match=r"f of module '0' uses a tensor of shape \(4,\)"):
        y.sum().backward()
    assert all(p.grad is None for p in network.parameters())


def test_reconstruction_that_is_not_finite():
    class Scale(nn.Module):
        def __init__(self, log):
            super().__init__()
            self.log = nn.Parameter(torch.tensor(log))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.cat([0 * self.norm(x) + self.log, 0 * x], 1)
    blocks = [AffineCoupling(Scale(0.1), Scale(0.1), clamp=None),
              AffineCoupling(Scale(0.1), Scale(0.1), clamp=None)]
    network = ReversibleSequential(*blocks)
    x = torch.randn(6, 8)
    network(x).sum().backward()
    with torch.no_grad():
        blocks[1].g.log.fill_(-200.0)  # its scale is 0 in float32, and what it scaled is lost
    before, kept = copy.deepcopy(network.state_dict()), x.clone()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    y = network(x)
    after_forward = copy.deepcopy(network.state_dict())
    random = random_state()[0]
    with pytest.raises(CannotReverse, match=r"what g of module '1' was given is no longer finite"):
        y.sum().backward()
    assert torch.equal(x, kept)
    assert torch.equal(random_state()[0], random)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())
    state = network.state_dict()
    assert all(torch.equal(after_forward[n], state[n]) for n in state)
    assert all(torch.equal(before[n], state[n]) for n in state if "norm" not in n)
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm1d))


class Draws(nn.Module):
    """Scales by what it draws or counts."""

    total = 0  # of the class, where nothing finds it

    def __init__(self, source):
        super().__init__()
        self.linear, self.source, self.count, self.seen = nn.Linear(4, 4), source, 0, []
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        self.count += 1
        Draws.total += 1
        self.seen.append(1)
        return self.linear(x) * {
            "torch": lambda: float(torch.rand(())), "python": random.random,
            "numpy": numpy.random.rand, "count": lambda: self.count, "list": lambda: len(self.seen),
            "own": lambda: float(torch.rand((), generator=self.generator)),
            "nowhere": lambda: 1.0 + Draws.total % 2,
        }[self.source]()


@pytest.mark.parametrize("source", ["torch", "python", "numpy", "count", "list", "own"])
def test_what_a_module_draws_and_remembers_is_found_again(source):
    blocks = [AdditiveCoupling(Draws(source), Draws(source)) for _ in range(3)]
    ours, plain = twins(blocks)
    x = torch.randn(6, 8, dtype=torch.float64)

    def step(network):
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        for _ in range(2):  # two forward passes before they are gone back through
            first, second = network(x).square().sum(), network(2 * x).sum()
            (first + second).backward()
        assert [m.count for m in network.modules() if isinstance(m, Draws)] == [4] * 6
        return {**{n: p.grad for n, p in network.named_parameters()},
                "drawn": torch.tensor([float(torch.rand(())), random.random()])}
    assert_same(step(ours), step(plain))


def test_what_cannot_be_found_again_is_refused():
    network = ReversibleSequential(*[AdditiveCoupling(Draws("nowhere"), nn.Linear(4, 4))])
    y = network(torch.randn(6, 8))
    with pytest.raises(CannotReverse, match=r"f of module '0' must make the same when it runs"):
        y.sum().backward()
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("change", [
    lambda y: y.relu_(), lambda y: nn.functional.dropout(y, 0.3, inplace=True), lambda y: y.mul_(2),
])
def test_what_follows_may_work_in_place(change):
    ours, plain = twins(additive("dense"))
    x = torch.randn(6, 8, dtype=torch.float64)
    for network in (ours, plain):
        torch.manual_seed(0)
        change(network(x)).square().sum().backward()
    assert_same({n: p.grad for n, p in ours.named_parameters()},
                {n: p.grad for n, p in plain.named_parameters()})


def test_gradients_are_handed_over_block_by_block():
    network = ReversibleSequential(*[
        AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
    x, order = torch.randn(6, 8), []
    network(x).sum().backward()
    for i in range(3):
        network[i].g.weight.register_post_accumulate_grad_hook(lambda p, i=i: order.append(i))
    before = network[0].g.weight.grad.clone()
    network[2].g.weight.register_post_accumulate_grad_hook(
        lambda p: order.append(torch.equal(network[0].g.weight.grad, before)))
    network(x).sum().backward()
    assert order == [2, True, 1, 0]
    torch.testing.assert_close(network[0].g.weight.grad, 2 * before)
