"""One expert's weight teaches, what is more than weights is called, and the dense form exports."""

import pytest
import torch
from torch import nn

from netwright.blocks import GLU, FeedForward, GLUExperts, MixtureOfExperts
from netwright.blocks.experts import LossFreeRouter, TopKRouter, WideNet, sublayers
from netwright.catalogue.facets import methods
from netwright.errors import UnknownName
from netwright.models import gpt
from netwright.reshape import mix_lora, moefy, prune_experts, upcycle

DIM = 6


def mixture(make=lambda: GLU(DIM, 8), **options):
    torch.manual_seed(0)
    return MixtureOfExperts(DIM, make, n_experts=4, **options)


# One expert a token.

def routers(network):
    return [module for module in network.modules() if isinstance(module, TopKRouter)]


@pytest.mark.parametrize("make", [
    lambda x: mixture(k=1, balance=0.0), lambda x: sublayers("g", DIM, k=1),
    lambda x: WideNet(DIM, 2, heads=2, k=1), lambda x: upcycle(FeedForward(DIM), x, k=1, noise=0.1),
    lambda x: prune_experts(mixture(k=2, balance=0.0), x, 3),
    lambda x: nn.Sequential(mix_lora(FeedForward(DIM), x, k=1, balance=0.0))])
def test_the_router_of_one_expert_learns(make):
    torch.manual_seed(1)
    x = torch.randn(2, 9, DIM)
    network = make(x)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p)  # as after a step: low-rank experts begin alike
    for moe in network.modules():
        if isinstance(moe, MixtureOfExperts):
            moe.balance = (0.0,) * moe.n_experts
        if isinstance(moe, TopKRouter):
            moe.k = 1
    network(x).square().sum().backward()
    found = routers(network)
    assert found
    assert all(router.weight.grad.abs().max() > 1e-6 for router in found)


def test_a_mixture_of_equal_experts_keeps_its_function_with_one():
    model, x = gpt(96, context=16), torch.randint(96, (4, 16))
    for reshape in (upcycle, mix_lora):
        torch.testing.assert_close(reshape(model, x, k=1)(x), model(x), rtol=1e-4, atol=1e-5)
    assert TopKRouter(DIM, 4, 1).softmax == "all"
    assert TopKRouter(DIM, 4, 2).softmax == "chosen"
    with pytest.raises(ValueError, match="normalize must be False with k=1"):
        LossFreeRouter(DIM, 4, 1, normalize=True)


# Experts that are more than their weights.

class Scaled(torch.Tensor):
    """A weight of which a product is 3 times as large, as quantised ones have their own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return 3 * y.as_subclass(torch.Tensor) if function is nn.functional.linear else y


def patched(layer):
    layer.forward = lambda x, own=layer.forward: own(x) + 1


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: y + 1)


def subclassed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Scaled), requires_grad=False)


@pytest.mark.parametrize("change", [patched, hooked, subclassed])
@pytest.mark.parametrize("part", [lambda moe: moe.experts[2], lambda moe: moe.experts[0].down,
                                  lambda moe: moe.experts[3].activation])
def test_what_is_more_than_weights_is_called(change, part):
    moe, x = mixture(), torch.randn(2, 9, DIM)
    if change is subclassed and not isinstance(part(moe), nn.Linear):
        change = hooked
    change(part(moe))
    routing = moe.router(x.flatten(0, 1))
    expected = sum(
        (routing.weights * (routing.experts == e)).sum(1, keepdim=True)
        * moe.experts[e](x.flatten(0, 1)) for e in range(4)).view_as(x)
    torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-5)


def test_stacked_experts_with_a_forward_of_their_own_are_called():
    moe, x = MixtureOfExperts(DIM, GLUExperts(DIM, 8, 4)), torch.randn(9, DIM)
    own = moe.experts.forward
    moe.experts.forward = lambda rows, counts: own(rows, counts) * 0
    assert not moe(x).any()


@pytest.mark.parametrize("reshape", [moefy, upcycle, mix_lora])
def test_weights_that_do_not_tell_all_are_not_taken_over(reshape):
    model, x = FeedForward(DIM, 32), torch.randn(9, DIM)
    patched(model[2])
    with pytest.raises(ValueError, match=r"layer '2' with a forward of its own"):
        reshape(model, x)


# The dense form.

@pytest.mark.parametrize("make", [lambda: GLU(DIM, 8), lambda: nn.Linear(DIM, DIM)])
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_the_dense_form_is_the_same(make, capacity):
    moe, x = mixture(make, capacity=capacity), torch.randn(3, 7, DIM, requires_grad=True)
    found = []
    for form in ("routed", "dense"):
        moe.form = form
        moe.zero_grad()
        x.grad = None
        y = moe(x)
        y.square().sum().backward()
        found.append([y, x.grad, *moe.usage, *(p.grad for p in moe.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnknownName, match="did you mean dense"):
        mixture(form="dens")
    moe.router = TopKRouter(DIM, 9)
    with pytest.raises(ValueError, match="choose experts from 0 to 3"):
        moe(x)


ROUTERS = [method.value for method in methods().values()
           if method.facets.kind == "block" and method.facets.place == "router"
           and "n_experts" in method.facets.takes and "dim" in method.facets.takes]


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # what a linked router remembers
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_every_routers_mixture_exports_and_compiles_in_one_graph(router):
    torch.manual_seed(0)
    moe = MixtureOfExperts(8, lambda: GLU(8, 8), router(8, n_experts=4)).eval()
    x = torch.randn(3, 5, 8)
    exported = torch.export.export(moe, (x,)).module()
    torch.testing.assert_close(exported(x), moe(x), rtol=1e-4, atol=1e-5)
    moe.form = "dense"
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), moe(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("reshape", [upcycle, moefy, mix_lora])
def test_what_reshapes_make_of_a_language_model_exports(reshape):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2)).eval()
    batch = {"input_ids": torch.randint(64, (2, 7)), "attention_mask": torch.ones(2, 7).long(),
             "use_cache": False}
    batch["attention_mask"][0, :3] = 0
    mixed = reshape(model, batch, n_experts=4)
    exported = torch.export.export(mixed, (), batch).module()
    torch.testing.assert_close(exported(**batch).logits, mixed(**batch).logits, rtol=1e-4,
                               atol=1e-5)
    [moe] = [m for m in mixed.modules() if isinstance(m, MixtureOfExperts)]
    assert int(moe.usage.load.sum()) == moe.router.k * 11 if reshape is moefy else 2 * 11
