from copy import deepcopy

import pytest
import torch
from torch.nn.functional import mse_loss

from netwright.blocks.kan import KANAutoencoder
from netwright.blocks.kan.bases import features


def reference(layer, x):
    found = features(x, layer.center, layer.reach, ("silu", "bspline"), layer.grid, layer.order)
    return torch.einsum("rki,oki->ro", found, layer.weight) + layer.bias


@pytest.mark.parametrize("last", ["sigmoid", "identity"])
def test_it_is_its_layers_one_after_another(last):
    torch.manual_seed(0)
    autoencoder = KANAutoencoder((6, 4, 2), grid=3, order=2, last=last).double()
    x = torch.rand(5, 6, dtype=torch.double)
    code = x
    for layer in autoencoder.encoder:
        code = reference(layer, code)
    assert code.shape == (5, 2)
    y = code
    for layer in autoencoder.decoder[:-1]:
        y = reference(layer, y)
    wanted = y.sigmoid() if last == "sigmoid" else y
    torch.testing.assert_close(autoencoder(x), wanted, rtol=1e-10, atol=1e-10)
    assert autoencoder.encoder[0].center[0] == 0.5
    assert [(layer.inputs, layer.outputs) for layer in autoencoder.decoder[:-1]] == [(2, 4), (4, 6)]


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)])
def test_any_leading_shape_and_lower_precision(shape):
    autoencoder, x = KANAutoencoder((6, 2)), torch.rand(shape)
    assert autoencoder(x).shape == shape
    assert autoencoder.encoder(x).shape == (*shape[:-1], 2)
    low = deepcopy(autoencoder).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    # Measured over ten seeds: at most 0.012.
    torch.testing.assert_close(low.float(), autoencoder(x), rtol=0, atol=0.05)


def test_a_curve_goes_through_one_number_and_not_through_anothers():
    t = torch.linspace(0, 1, 100)[:, None]
    x = torch.cat([t, t.square(), (3 * t).sin(), (t - 0.5).abs()], 1)

    def error(seed, shuffled):
        torch.manual_seed(seed)
        autoencoder = KANAutoencoder((4, 1), last="identity")
        given = x[torch.randperm(100)] if shuffled else x
        optimizer = torch.optim.Adam(autoencoder.parameters(), 0.02)
        for _ in range(100):
            optimizer.zero_grad()
            loss = mse_loss(autoencoder(given), x)
            loss.backward()
            optimizer.step()
        return loss.item()

    learnt, shuffled = ([error(seed, f) for seed in range(2)] for f in (False, True))
    # Measured over five seeds: 0.022 to 0.038, and 0.066 to 0.081.
    assert max(learnt) < 0.7 * min(shuffled)


def test_states_round_trip_and_draws_repeat():
    one, other = (KANAutoencoder((6, 2), generator=torch.Generator().manual_seed(s))
                  for s in (1, 2))
    x = torch.rand(3, 6)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), deepcopy(other)(x))


def test_what_it_cannot_build_is_named():
    for sizes in ((4,), (4, 0)):
        with pytest.raises(ValueError, match="sizes must be those of the inputs"):
            KANAutoencoder(sizes)
    with pytest.raises(ValueError, match="no last activation is called 'tanh'; known are"):
        KANAutoencoder((4, 2), last="tanh")
    with pytest.raises(ValueError, match=r"x must be \(\*, 4\)"):
        KANAutoencoder((4, 2))(torch.zeros(3, 5))
