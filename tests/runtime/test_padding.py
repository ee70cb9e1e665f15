import pytest
import torch
from torch import nn

from netwright.runtime.padding import held, holding, read_padding, real_of, real_rows

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Seen(nn.Module):
    """Notes what is held when it runs."""

    def __init__(self):
        super().__init__()
        self.real = []

    def forward(self, x):
        self.real.append(real_of(x))
        return x


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = Seen()

    def forward(self, inputs_embeds, attention_mask=None, past_key_values=None):
        return self.seen(inputs_embeds)


class Both(nn.Module):
    """An encoder and a decoder, of which the second is given no mask of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.after = Stack(), Stack(), Seen()

    def forward(self, inputs_embeds, attention_mask=None):
        h = self.encoder(inputs_embeds, attention_mask=attention_mask)
        return self.after(self.decoder(h))


@pytest.mark.parametrize("mask", [
    MASK, MASK.bool(), MASK.float(), MASK[:, None, None].bool().expand(2, 1, 3, 3),
    (MASK.float() - 1)[:, None, None].expand(2, 1, 3, 3) * torch.finfo(torch.float32).max])
def test_masks_of_every_kind_say_the_same(mask):
    stack = Stack()
    read_padding(stack)
    stack(torch.ones(2, 3, 4), attention_mask=mask)
    assert torch.equal(stack.seen.real[0], MASK.bool())
    assert held() is None


def test_of_a_cached_pass_the_last_positions_count():
    stack = Stack()
    read_padding(stack)
    stack(torch.ones(2, 1, 4), MASK.flip(1), past_key_values=object())
    assert stack.seen.real[0].tolist() == [[True], [True]]
    stack(torch.ones(2, 1, 4), MASK.flip(1))  # a mask of another length is another stream's
    assert stack.seen.real[1] is None


def test_an_encoder_and_a_decoder_have_each_its_own():
    model = Both()
    handles = read_padding(model)
    assert read_padding(model) == []
    model(torch.ones(2, 3, 4), attention_mask=MASK)
    assert torch.equal(model.encoder.seen.real[0], MASK.bool())
    assert model.decoder.seen.real == [None]
    assert torch.equal(model.after.real[0], MASK.bool())
    for handle in handles:
        handle.remove()
    model(torch.ones(2, 3, 4), attention_mask=MASK)
    assert model.encoder.seen.real[1] is None


def test_nothing_is_held_after_a_failed_pass():
    stack = Stack()
    read_padding(stack)
    stack.seen.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stack(torch.ones(2, 3, 4), attention_mask=MASK)
    assert held() is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_encoder_says_it_by_its_own_mask(batch_first):
    layer = nn.TransformerEncoderLayer(4, 1, 8, batch_first=batch_first)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    network.layers[1].linear1 = nn.Sequential(Seen(), network.layers[1].linear1)
    read_padding(network)
    x = torch.ones(2, 3, 4) if batch_first else torch.ones(3, 2, 4)
    network(x, src_key_padding_mask=MASK == 0)
    expected = MASK.bool() if batch_first else MASK.bool().T
    assert torch.equal(network.layers[1].linear1[0].real[0], expected)


def test_rows_and_vectors_in_one_row():
    x = torch.arange(6.0).view(2, 3, 1)
    with holding(MASK):
        assert real_rows(x).flatten().tolist() == [0, 1, 3]
        assert real_rows(x.view(6, 1)).flatten().tolist() == [0, 1, 3]
        assert len(real_rows(torch.ones(5, 1))) == 5
        with holding(None):
            assert len(real_rows(x)) == 2 * 3
    assert held() is None
