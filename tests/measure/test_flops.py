"""FLOPs against counts by hand, and what has no formula is named."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import netwright as nw


class Apply(nn.Module):
    """A function with a parameter, so that a step has something to differentiate."""

    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x)


def forward(function, x):
    module = function if isinstance(function, nn.Module) else Apply(function)
    return nw.measure.cost(module, (x, None), repeats=1, warmup=0)


def step(module, x):
    def total(output, _):
        first = output[0] if isinstance(output, tuple) else output
        return first.square().sum()
    return nw.measure.cost(module, (x, x), loss=total, repeats=1, warmup=0)


def quantized(x):
    rows = torch.randint(-9, 9, (32, x.shape[0]), dtype=torch.int8)
    return torch._int_mm(rows, x.to(torch.int8))


B, M, N, K = 2, 3, 5, 7
POSITIVE = torch.eye(6) + torch.ones(6, 6)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch says once that these are in beta
    ROWS = torch.eye(K).to_sparse_csr()
PRODUCTS = {
    "vector by vector": (lambda x: torch.dot(x, x), (K,), 2 * K),
    "complex vectors": (lambda x: torch.vdot(x, x), (K,), 2 * K),
    "matrix by vector": (lambda x: x @ torch.ones(K), (M, K), 2 * M * K),
    "added to a vector": (lambda x: torch.addmv(torch.ones(M), x, torch.ones(K)), (M, K),
                          2 * M * K),
    "outer product added": (lambda x: torch.addr(torch.zeros(K, K), x, x), (K,), 2 * K * K),
    "sum of products": (lambda x: torch.addbmm(torch.zeros(M, N), x, torch.ones(B, K, N)),
                        (B, M, K), 2 * B * M * K * N),
    "in place": (lambda x: torch.zeros(M, N).addmm_(x, torch.ones(K, N)), (M, K), 2 * M * K * N),
    "batch in place": (lambda x: torch.zeros(B, M, N).baddbmm_(x, torch.ones(B, K, N)),
                       (B, M, K), 2 * B * M * K * N),
    "einsum": (lambda x: torch.einsum("bmk,nk->bmn", x, torch.ones(N, K)), (B, M, K),
               2 * B * M * K * N),
    "int8": (quantized, (16, 24), 2 * 32 * 16 * 24),
    "sparse by dense": (lambda x: torch.eye(K).to_sparse() @ x, (K, N), 2 * K * N),
    "sparse rows by dense": (lambda x: ROWS @ x, (K, N), 2 * K * N),
    "sparse by vector": (lambda x: ROWS @ x, (K,), 2 * K),
    "Cholesky": (lambda x: torch.linalg.cholesky(POSITIVE), (1,), 6 ** 3 / 3),
    "triangle": (lambda x: torch.linalg.solve_triangular(POSITIVE, x, upper=True), (6, 4),
                 6 * 6 * 4),
    "inverse": (lambda x: torch.linalg.inv(POSITIVE), (1,), 2 * 6 ** 3),
    "solve": (lambda x: torch.linalg.solve(POSITIVE, x), (6, 4),
              2 / 3 * 6 ** 3 + 2 * 6 * 6 * 4),
    "determinant": (lambda x: torch.linalg.slogdet(POSITIVE)[1], (1,), 2 / 3 * 6 ** 3),
    "factors": (lambda x: torch.linalg.lu_factor(POSITIVE)[0], (1,), 2 / 3 * 6 ** 3),
    "solve by Cholesky": (lambda x: torch.cholesky_solve(x, POSITIVE), (6, 4), 2 * 36 * 4),
    "elementwise": (lambda x: torch.softmax(x * 2, -1).cumsum(0), (M, K), 0),
    "moves": (lambda x: torch.cat([x, x.flip(0)]).index_select(0, torch.tensor([0])), (M, K), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_counted_by_hand(name):
    function, shape, expected = PRODUCTS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.complex64 if name == "complex vectors" else None)
    found = forward(function, x)
    assert found.flops == round(expected)
    assert found.uncounted == ()


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_cost_the_same_three_times_in_a_step(groups, transposed):
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = make(8, 16, 3, stride=2, groups=groups), torch.randn(2, 8, 9, 11)
    shape = x.shape if transposed else layer(x).shape
    once = 2 * 2 * shape[2] * shape[3] * 9 * 8 * 16 // groups
    assert forward(layer, x).flops == once
    assert step(nn.Sequential(layer), x.requires_grad_()).flops == 3 * once


def test_a_convolution_without_a_batch_is_counted_once():
    layer = nn.Conv1d(4, 6, 3)
    assert forward(layer, torch.randn(4, 10)).flops == 2 * 8 * 3 * 4 * 6


def test_a_bilinear_layer_sums_over_one_side_and_then_over_the_other():
    layer, other = nn.Bilinear(4, 6, 5), torch.randn(3, 6)

    def pair(x):
        return layer(x, other)
    assert forward(pair, torch.randn(3, 4)).flops == 2 * 3 * 5 * 4 * 6 + 2 * 3 * 5 * 6


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_recurrent_layers_multiply_inputs_and_states(kind, gates, layers, both):
    layer = kind(12, 24, layers, bidirectional=both)
    found = forward(layer, torch.randn(10, 2, 12))
    inputs = [12] + [24 * (1 + both)] * (layers - 1)
    by_hand = sum(2 * 20 * gates * 24 * (width + 24) for width in inputs) * (1 + both)
    assert found.flops == by_hand
    assert found.uncounted == ()
    assert step(layer, torch.randn(10, 2, 12)).flops >= 2 * by_hand


def test_padded_sequences_are_counted_by_their_real_steps():
    layer, lengths = nn.LSTM(12, 24), torch.tensor([10, 4])

    def packed(x):
        return layer(nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data
    assert forward(packed, torch.randn(10, 2, 12)).flops == 2 * 14 * 4 * 24 * 36


def encoder(batch, length, dim, hidden):
    tokens = batch * length
    return 2 * tokens * (4 * dim * dim + 2 * dim * hidden) + 4 * batch * length * length * dim


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_encoder_layer_costs_the_same_on_its_fused_path(mode):
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    x = torch.randn(2, 16, 32)
    found = forward(layer, x) if mode == "eval" else step(layer, x)
    assert found.uncounted == ()
    if mode == "eval":
        assert found.flops == encoder(2, 16, 32, 64)
    else:
        assert found.flops >= 2 * encoder(2, 16, 32, 64)


@pytest.mark.parametrize(("queries", "heads"), [(6, 4), (9, 4), (6, 2)])
def test_attention_on_a_processor_counts_its_two_products(queries, heads):
    keys = torch.randn(2, heads, 6, 8)

    def attend(x):
        return functional.scaled_dot_product_attention(x, keys, keys, enable_gqa=True)
    found = forward(attend, torch.randn(2, 4, queries, 8))
    assert found.flops == 2 * 2 * 2 * 4 * queries * 6 * 8


def test_attention_in_a_step_is_what_pytorch_counts_of_the_same_kernel_elsewhere():
    q = torch.randn(2, 4, 6, 8)
    found = step(Apply(lambda x: functional.scaled_dot_product_attention(x * 1, x, x)),
                 q.requires_grad_()).flops
    assert found == 2 * 2 * 4 * 6 * 6 * 8 * (2 + 5)


def test_an_ordinary_network_is_counted_as_pytorch_counts_it():
    network = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Flatten(), nn.Linear(36, 4))
    x = torch.randn(5, 3, 8)
    with FlopCounterMode(display=False) as counter:
        network(x).square().sum().backward()
    assert step(network, x).flops == counter.get_total_flops()


@torch.library.custom_op("netwright_tests::blend", mutates_args=())
def blend(x: torch.Tensor) -> torch.Tensor:
    return x @ x.T


UNKNOWN = {
    "aten._fft_r2c": lambda x: torch.fft.rfft(x),
    "aten._linalg_eigh": lambda x: torch.linalg.eigvalsh(x @ x.T),
    "aten.linalg_qr": lambda x: torch.linalg.qr(x).R,
    "aten._cdist_forward": lambda x: torch.cdist(x, x, p=1),
    "netwright_tests.blend": blend,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_sums_products_and_has_no_formula_is_named(name):
    assert name in forward(UNKNOWN[name], torch.randn(6, 6)).uncounted


def test_every_formula_is_of_an_operation_that_is_there():
    from netwright.measure._flops import _FORMULAS
    for name in _FORMULAS:
        space, bare = name.split(".")
        assert hasattr(getattr(torch.ops, space), bare), name
