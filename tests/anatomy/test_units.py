import pytest
import torch
from torch import Tensor, nn

from netwright.anatomy.units import Units, hidden_units

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
IDS = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 20}


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10), nn.GELU(),
                         nn.Dropout(), nn.Linear(10, 3))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="bottleneck"))


@pytest.mark.parametrize(("make", "x", "counts"), [
    (cnn, PICTURES[..., :8, :8], [6, 8, 10]),
    (gpt2, {"input_ids": IDS}, [64, 64]),
    (llama, {"input_ids": IDS}, [20, 20]),
    (bert, {"input_ids": IDS}, [20, 20, 16]),  # and the pooler's, which the classifier reads
    (resnet, {"pixel_values": PICTURES}, [2, 2, 2, 2, 4, 4, 4, 4]),
], ids=["cnn", "gpt2", "llama", "bert", "resnet"])
def test_a_silenced_unit_is_one_whose_maker_does_not_matter(make, x, counts) -> None:
    """Units whose outgoing weights are 0 can have any incoming weights; others cannot."""
    torch.manual_seed(0)
    model = make().eval()
    found = hidden_units(model, x)
    assert [units.count for units in found] == counts

    def output() -> Tensor:
        with torch.no_grad():
            result = model(x) if isinstance(x, Tensor) else model(**x)
        return result if isinstance(result, Tensor) else result.logits

    for units in found:
        units.outgoing()[:, 1] = 0
        before = output()
        for maker in units.makers:
            units.incoming(maker)[1] += 1
        assert torch.allclose(output(), before, atol=1e-6)
        for maker in units.makers:
            units.incoming(maker)[0] *= 2
        assert not torch.allclose(output(), before, atol=1e-6)


@pytest.mark.parametrize(("make", "x"), [(cnn, PICTURES[..., :8, :8]),
                                         (gpt2, {"input_ids": IDS})], ids=["cnn", "gpt2"])
def test_values_are_what_the_outgoing_weights_read(make, x) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for units in hidden_units(model, x):
        taken: list[Tensor] = []
        hooks = [units.reader.register_forward_pre_hook(lambda _, i, t=taken: t.append(i[0])),
                 units.reader.register_forward_hook(lambda _, __, o, t=taken: t.append(o))]
        model(x) if isinstance(x, Tensor) else model(**x)
        for hook in hooks:
            hook.remove()
        h, out = taken
        values = units.values(h)
        assert values.shape[1] == units.count
        if units.outgoing().ndim == 3:  # no convolution
            made = torch.einsum("ncp,ocp->no", values, units.outgoing()) + units.reader.bias
            assert torch.allclose(made, out.reshape(made.shape), atol=1e-5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.outer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.outer(torch.relu(self.inner(h)))
        return self.last(h)


class Mixed(nn.Module):
    """A unit that something else reads too, and one that a softmax mixes with the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.b(h).softmax(-1)) + h.mean()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def test_units_that_others_read_or_mix_are_left_out() -> None:
    x = torch.randn(3, 4)
    assert [units.name for units in hidden_units(Residual(), x)] == ["inner"]
    assert hidden_units(Mixed(), x) == []
    assert hidden_units(Twice(), x) == []
    normed = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert hidden_units(normed, x) == []
    assert hidden_units(nn.Linear(4, 2), x) == []


def test_tied_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert [u.name for u in hidden_units(model, torch.randn(2, 4))] == ["0", "2"]
    model[2].weight = model[0].weight
    assert hidden_units(model, torch.randn(2, 4)) == []


def test_looking_changes_nothing() -> None:
    model, x = cnn(), PICTURES[..., :8, :8]
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        found = hidden_units(model, x)
    assert len(found) == 3
    assert all(isinstance(units, Units) for units in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
