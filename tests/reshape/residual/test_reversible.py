from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.reversible import ReversibleSequential
from netwright.data import digits
from netwright.errors import CannotReverse, NothingToReshape, UnknownName
from netwright.measure import cost, memory
from netwright.models import gpt, mlp
from netwright.reshape import reversible
from netwright.rules import Backprop, Reversible
from netwright.stages import call
from netwright.stages._transformers import is_cache

IDS = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0
Y = torch.tensor([0, 1, 2])
ONCE = {"repeats": 1, "warmup": 0}


class Residual(nn.Module):
    """A branch on a normalised copy, with dropout."""

    def __init__(self, width=8, dropout=0.2):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(dropout),
                                 nn.Linear(2 * width, width))

    def forward(self, h):
        return h + self.mlp(self.norm(h))


class Counted(nn.Module):
    """A residual block of convolutions with batch norm, activated after the sum."""

    def __init__(self, width=4):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False),
                                    nn.BatchNorm2d(width))

    def forward(self, h):
        return torch.relu(h + self.branch(h))


def residual(depth=4, **options):
    return nn.Sequential(nn.Linear(5, 8), *[Residual(**options) for _ in range(depth)],
                         nn.Linear(8, 3))


def convolutional():
    return (nn.Sequential(nn.Conv2d(1, 4, 3), *[Counted() for _ in range(3)], nn.Flatten(),
                          nn.Linear(144, 3)), torch.randn(3, 1, 8, 8))


class Looped(nn.Module):
    """Hands its blocks a mask beside the signal, from a list of its own."""

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


def hugging_face(name, task, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}For{task}")(config)


def text(name, task="SequenceClassification"):
    model = hugging_face(name, task, vocab_size=20, hidden_size=8, intermediate_size=16,
                         num_hidden_layers=3, num_attention_heads=2, num_labels=3, pad_token_id=0)
    return model, {"input_ids": IDS, "attention_mask": MASK}


def gpt2(task="LMHeadModel"):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, n_positions=16,
                                     bos_token_id=0, eos_token_id=0)
    return getattr(transformers, f"GPT2{task}")(config), {"input_ids": IDS, "attention_mask": MASK}


def vit():
    return hugging_face("ViT", "ImageClassification", hidden_size=8, intermediate_size=16,
                        num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4,
                        num_channels=1, num_labels=3, hidden_dropout_prob=0.1), {
        "pixel_values": torch.randn(3, 1, 8, 8)}


def resnet(kind):
    return hugging_face("ResNet", "ImageClassification", num_channels=1, embedding_size=8,
                        hidden_sizes=[8, 16], depths=[3, 3], layer_type=kind, num_labels=3), {
        "pixel_values": torch.randn(3, 1, 16, 16)}


def looped():
    return Looped(), (torch.randn(3, 5), (torch.rand(3, 8) > 0.3).float())


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 8), stack, nn.Linear(8, 3)), torch.randn(3, 6, 5)


MODELS = {
    "residual": lambda: (residual(), torch.randn(3, 5)),
    "convolutional": convolutional,
    "looped": looped,
    "gpt": lambda: (gpt(20, 8, width=16, depth=3), IDS),
    "encoder": encoder,
    "vit": vit,
    "bert": lambda: text("Bert"),
    "llama": lambda: text("Llama"),
    "gpt2": gpt2,
    "basic": lambda: resnet("basic"),
    "bottleneck": lambda: resnet("bottleneck"),
}


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(part) for key, part in value.items()}
    return tuple(map(double, value))


def made(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.double(), double(x)


def loss(output):
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


def stepped(model, x):
    """Two steps' outputs, gradients and buffers, with dropout."""
    torch.manual_seed(1)
    model.zero_grad()
    outputs = []
    for _ in range(2):
        outputs.append(call(model, x))
        loss(outputs[-1]).backward()
    return [*outputs, *[p.grad for p in model.parameters() if p.grad is not None],
            *model.buffers()]


class Autograd(ReversibleSequential):
    """The same blocks under plain autograd."""

    def forward(self, x, *args, **options):
        for block in self:
            x = block(x, *args, **options)
        return x


@pytest.mark.parametrize("how", ["coupling", "momentum"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd_and_the_model_given_is_untouched(name, how):
    model, x = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, names = torch.get_rng_state(), [n for n, _ in model.named_modules()]
    flat = reversible(model.train(), x, how=how)
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, _ in model.named_modules()] == names
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert flat.reversible_changes
    assert flat.training
    plain = deepcopy(flat)
    for module in plain.modules():
        if isinstance(module, ReversibleSequential):
            module.__class__ = Autograd
    ours, theirs = stepped(flat, x), stepped(plain, x)
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_kept_and_a_state_of_the_model_given_loads(name):
    model, x = made(name)
    flat = reversible(model, x)
    assert sum(p.numel() for p in flat.parameters()) == sum(p.numel() for p in model.parameters())
    now = {key: value.clone() for key, value in flat.state_dict().items()}
    for key, value in model.state_dict().items():
        moved = next((flat.reversible_keys[old] + key.removeprefix(old)
                      for old in flat.reversible_keys if key.startswith(old)), key)
        assert torch.equal(now[moved], value)
    assert len(now) == len(model.state_dict())
    torch.manual_seed(9)
    other = MODELS[name]()[0].double()
    assert not flat.load_state_dict(other.state_dict()).missing_keys
    expected = reversible(other, x).eval()
    torch.testing.assert_close(call(flat.eval(), x), call(expected, x))
    expected.load_state_dict(now)  # and its own state loads as well
    assert not torch.equal(call(flat, x), call(expected, x))


def test_llama_is_two_streams_of_attention_and_feed_forward():
    model, x = made("llama")
    flat = reversible(model).eval()
    assert flat.reversible_changes == (
        "model.layers.0 to 2: 3 blocks (LlamaDecoderLayer) in two coupled streams, each in 2 "
        "parts: self_attn, mlp",)
    inputs, layers = {}, model.eval().model.layers
    layers[0].register_forward_pre_hook(lambda _, args, options: inputs.update(
        h=args[0], options=options), with_kwargs=True)
    model(**x)
    a = b = inputs["h"]
    given = {name: None if is_cache(value) else value for name, value in inputs["options"].items()}
    for layer in layers:
        a = a + layer.self_attn(layer.input_layernorm(b), **given)[0]
        b = b + layer.mlp(layer.post_attention_layernorm(a))
    layers[2].register_forward_hook(lambda *_: (a + b) / 2)
    torch.testing.assert_close(call(flat, x), call(model, x), rtol=1e-10, atol=1e-12)


def test_vit_is_two_streams_of_attention_and_feed_forward():
    model, x = made("vit")
    flat, blocks = reversible(model).eval(), model.eval().vit.layers
    inputs = {}
    blocks[0].register_forward_pre_hook(lambda _, args: inputs.update(h=args[0]))
    model(**x)
    a = b = inputs["h"]
    for block in blocks:
        attended = block.attention(block.layernorm_before(b))
        a = a + (attended[0] if isinstance(attended, tuple) else attended)
        b = b + block.mlp(block.layernorm_after(a))
    blocks[2].register_forward_hook(lambda *_: (a + b) / 2)
    torch.testing.assert_close(call(flat, x), call(model, x), rtol=1e-10, atol=1e-12)


def test_blocks_with_one_branch_take_turns():
    model, x = made("residual")
    flat = reversible(model, x).eval()
    a = b = model.eval()[0](x)
    for k, block in enumerate(model[1:-1]):
        a, b = (a + block(b) - b, b) if k % 2 == 0 else (a, b + block(a) - a)
    torch.testing.assert_close(flat(x), model[-1]((a + b) / 2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["residual", "bert", "basic"])
def test_momentum_is_the_papers_recursion(name):
    model, x = made(name)
    flat = reversible(model.eval(), x, how="momentum", gamma=0.7)
    if name == "residual":
        h, v = model[0](x), 0
        for block in model[1:-1]:
            v = 0.7 * v + 0.3 * (block(h) - h)
            h = h + v
        torch.testing.assert_close(flat(x), model[-1](h), rtol=1e-10, atol=1e-12)
    near = reversible(model, x, how="momentum", gamma=1e-7)
    torch.testing.assert_close(call(near, x), call(model, x), rtol=1e-4, atol=1e-5)
    assert (call(flat, x) - call(model, x)).abs().max() > 1e-7


def test_which_blocks_are_changed():
    model, x = made("bottleneck")
    first, second = reversible(model, x).reversible_changes
    assert first.startswith("resnet.encoder.stages.0.layers.0 to 2: 3 blocks (ResNetBottleNeck")
    assert second.startswith("resnet.encoder.stages.1.layers.1 to 2: 2 blocks")  # 0 changes shape
    bert, x = made("bert")
    assert reversible(bert).reversible_changes[0].endswith("each as a whole")  # normalises after
    two, x = nn.Sequential(nn.Linear(5, 8), Residual(), Residual(), nn.Linear(8, 8), nn.Tanh(),
                           Residual(), Residual(), nn.Linear(8, 8), Residual()), torch.randn(3, 5)
    assert [change.partition(":")[0] for change in reversible(two, x).reversible_changes] == [
        "1 to 2", "5 to 6"]


def test_memory_is_flat_in_depth():
    x = torch.randn(4096, 5)  # large beside a random state, of which dropout keeps one each
    batch = x, torch.randint(3, (4096,))
    ways = {"plain": lambda n: n, "coupled": lambda n: reversible(n, x[:2]),
            "momentum": lambda n: reversible(n, x[:2], how="momentum", exact=False)}
    found = memory(residual, [4, 10], batch, rules=ways)
    growth = found.growth()
    assert growth["plain"] > 2
    assert growth["coupled"] < 1.02
    assert growth["momentum"] < 1.02
    assert found.growth("working")["coupled"] < 1.02


def test_rounding_of_a_momentum_network_is_kept_by_default():
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    gradients = {}
    for name, exact in (("kept", None), ("lost", False)):
        flat = reversible(residual(24, dropout=0.0), x, how="momentum", gamma=0.6, exact=exact)
        flat.load_state_dict(reversible(residual(24), x, how="momentum").state_dict())
        plain = deepcopy(flat)
        for module in plain.modules():
            if isinstance(module, ReversibleSequential):
                module.__class__ = Autograd
        flat(x).square().sum().backward()
        plain(x).square().sum().backward()
        gradients[name] = max((p.grad - q.grad).abs().max().item() for p, q in
                              zip(flat.parameters(), plain.parameters(), strict=True))
    assert gradients["kept"] < 1e-4
    assert gradients["lost"] > 20 * gradients["kept"]


def test_the_rule_and_backpropagation_agree_on_a_changed_model():
    model, x = made("llama")
    flat = reversible(model)
    Backprop(flat)(x, Y)
    exact = [p.grad.clone() for p in flat.parameters() if p.grad is not None]
    flat.zero_grad()
    Reversible(flat, x)(x, Y)
    for p, gradient in zip([p for p in flat.parameters() if p.grad is not None], exact,
                           strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)
    assert nw.reshape.reversible is reversible


@pytest.mark.parametrize("make", [lambda: text("Llama", "CausalLM"), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("how", ["coupling", "momentum"])
def test_generation_uses_a_cache_and_training_refuses_one(make, how):
    torch.manual_seed(0)
    flat = reversible(make()[0], how=how)
    assert flat.config.use_cache is False
    ids = IDS[:1]
    plain, cached = (flat.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0,
                                          attention_mask=torch.ones_like(ids), use_cache=use)
                     for use in (False, True))
    assert torch.equal(plain, cached)
    with pytest.raises(CannotReverse, match="use_cache=False"):
        flat.train()(input_ids=ids, use_cache=True)


def test_copies_dtypes_autocast_and_frozen_parameters():
    torch.manual_seed(0)
    model, x = residual(dropout=0.0), torch.randn(6, 5)
    model[2].requires_grad_(False)
    flat = reversible(model, x)
    copied = deepcopy(flat)
    copied(x).sum().backward()
    assert all(p.grad is None for p in flat.parameters())
    assert [p.grad is None for p in copied.parameters()] == [
        not p.requires_grad for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        flat(x).sum().backward()
    for p, q in zip(flat.parameters(), copied.parameters(), strict=True):
        assert p.grad is None or p.grad.dtype == torch.float32
        assert p.grad is None or (p.grad - q.grad).abs().max() < 0.2 * q.grad.abs().max() + 0.1
    low = reversible(model, x).bfloat16()
    low(x.bfloat16()).float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.parameters())
    assert cost(flat, (x, torch.zeros(6, dtype=torch.long)), **ONCE).saved_bytes > 0


def test_learns_what_a_frozen_stack_does_not():
    split = digits()
    x, y = split.x_train.flatten(1), split.y_train

    def train(labels, how, frozen=False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 8), *[Residual(dropout=0.0) for _ in range(4)],
                                nn.Linear(8, 10))
        if frozen:
            network[:-1].requires_grad_(False)
        flat = reversible(network, x[:4], how=how)
        optimizer = torch.optim.Adam([p for p in flat.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(80):
            batch = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(flat(x[batch]), labels[batch]).backward()
            optimizer.step()
        scores = flat.eval()(split.x_test.flatten(1))
        return (scores.argmax(1) == split.y_test).float().mean().item()

    assert train(y, "momentum") > 0.7
    learned = train(y, "coupling")
    assert learned > 0.8
    assert learned > train(y, "coupling", frozen=True) + 0.1
    assert train(y[torch.randperm(len(y))], "coupling") < 0.35


def test_errors():
    x = torch.randn(3, 5)
    with pytest.raises(NothingToReshape, match="Sequential has no residual blocks in a row"):
        reversible(mlp(5, 3), x)
    with pytest.raises(NothingToReshape, match="no residual blocks in a row"):
        reversible(residual(1), x)
    with pytest.raises(UnknownName, match="did you mean momentum"):
        reversible(residual(), x, how="momentun")
    with pytest.raises(ValueError, match=r"gamma must be above 0 and below 1, got 0\.0.*the one"):
        reversible(residual(), x, how="momentum", gamma=0.0)
    with pytest.raises(ValueError, match="example must be an input of Sequential, got None"):
        reversible(residual())
    compiled = residual()
    compiled._orig_mod = nn.Identity()  # as torch.compile calls it
    with pytest.raises(NothingToReshape, match="compiled"):
        reversible(compiled, x)


@pytest.mark.parametrize("how", ["coupling", "momentum"])
def test_a_reversible_model_exports_and_compiles_for_inference_as_one_graph(how):
    torch.manual_seed(0)
    x = torch.randint(16, (2, 8))
    model = nw.reshape.reversible(nw.models.gpt(16, context=8, width=16, depth=2, heads=2), x,
                                  how=how).eval()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, intermediate_size=32, vocab_size=20, initializer_range=0.2, **options))


def post_norm(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32, "vocab_size": 20,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Olmo2", "Gemma2", "Gemma3", "Glm4"])
def test_attention_behind_a_norm_runs_once_and_feeds_its_cache_once(kind):
    model = post_norm(kind)
    result = reversible(model, {"input_ids": IDS})
    assert all("each in 2 parts" in said for said in result.reversible_changes)
    ran = []
    for name, module in result.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        output = result(input_ids=IDS, use_cache=True)
    assert len(ran) == len(set(ran)) == 3
    assert output.past_key_values.get_seq_length() == IDS.shape[1]
    written = result.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                              use_cache=True)
    assert torch.equal(written, result.generate(
        IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("how", ["coupling", "momentum"])
@pytest.mark.parametrize("first", [False, True])
def test_checkpointing_that_is_switched_on_changes_nothing(how, first):
    model = llama()
    if first:
        model.gradient_checkpointing_enable()
    result = reversible(model, {"input_ids": IDS}, how=how).train()
    if not first:
        result.gradient_checkpointing_enable()
    grads = []
    for _ in range(2):
        result.zero_grad()
        result(input_ids=IDS).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in result.parameters()])
        result.gradient_checkpointing_disable()
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("change", [nw.reshape.reversible, nw.reshape.parallelize_residual])
def test_blocks_say_what_they_said_where_models_read_it(change):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32,
        vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2)).eval()
    result = change(model, {"input_ids": IDS})
    assert result(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("change", [nw.reshape.reversible, nw.reshape.parallelize_residual])
def test_each_module_keeps_its_own_mode(change):
    model = residual().train()
    model[2].mlp[2].eval()
    model[3].eval()
    result = change(model, torch.randn(2, 5))
    modes = [m.training for m in result.modules() if isinstance(m, nn.Dropout)]
    assert modes == [m.training for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [m.training for m in result.modules() if isinstance(m, Residual)] == [
        True, True, False, True]


@pytest.mark.parametrize("change", [
    lambda m, x: reversible(m, x), lambda m, x: reversible(m, x, how="momentum"),
    lambda m, x: nw.reshape.parallelize_residual(m, x),
    lambda m, x: nw.reshape.parallelize_residual(m, x, group=2)])
def test_what_was_trained_goes_back_to_the_network_as_it_was(change, tmp_path):
    model = gpt(20, context=8, width=16, depth=4, heads=2)
    result = change(model, IDS)
    with torch.no_grad():
        for p in result.parameters():
            p.add_(1)
    nw.save(result, tmp_path)
    again = nw.load(tmp_path, model)
    expected = {name: p + 1 for name, p in model.named_parameters()}
    model.load_state_dict(nw.reshape.original_state(again))
    assert all(torch.allclose(p, expected[name]) for name, p in model.named_parameters())


def test_blocks_are_found_around_what_looks_like_branches_inside_them():
    transformers = pytest.importorskip("transformers")
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1))
    x = {"input_ids": torch.randint(20, (2, 5))}
    flat = reversible(model, x)
    assert flat.reversible_changes[0].startswith("model.layers.0 to 2: 3 blocks")
    assert call(flat, x).isfinite().all()


def test_a_pretrained_backbone_of_another_network_trains_without_a_cache():
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = transformers.GPT2Model(transformers.GPT2Config(
                vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
            self.head = nn.Linear(16, 3)

        def forward(self, tokens):
            return self.head(self.body(tokens)[0][:, -1])

    x = torch.randint(20, (2, 5))
    flat = reversible(Classifier(), x)
    flat(x).sum().backward()
    assert all(p.grad is not None for p in flat.body.h.parameters())
