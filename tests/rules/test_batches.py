"""Batches as Hugging Face's loaders give them go into rules as they are."""

import pytest
import torch
from torch import Tensor, nn

from netwright.rules import Backprop, DirectFeedbackAlignment, FeedbackAlignment, MonoForward, Rule
from netwright.rules.batches import labels_apart, next_tokens

IDS = torch.arange(14).view(2, 7) * 5 % 11
MASKED = IDS.masked_fill(torch.arange(7) > 4, -100)


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2))


def classifier(kind: str) -> nn.Module:
    import transformers
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, num_labels=3, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0))


def exact(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's own loss of a batch with labels, and its gradients."""
    loss = network(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("labels", [IDS, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("how", ["within", "left out", "beside", "tokens alone"])
def test_labels_of_a_language_model_are_what_follows(labels: Tensor, how: str) -> None:
    network = language_model()
    loss, gradients = exact(network, {"input_ids": IDS, "labels": labels})
    rule = Backprop(network)
    batch = {"input_ids": IDS, "labels": labels}
    got = {"within": lambda: rule(batch, None), "left out": lambda: rule(batch),
           "beside": lambda: rule({"input_ids": IDS}, labels),
           "tokens alone": lambda: rule(IDS, labels)}[how]()
    torch.testing.assert_close(got, loss)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])


def test_labels_that_were_moved_already_are_taken_as_they_are() -> None:
    network = language_model()
    rule, expected = Backprop(network), network(IDS[:, :-1]).logits
    got = rule(IDS[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(got, nn.functional.cross_entropy(
        expected.flatten(0, 1), IDS[:, 1:].flatten()).detach())


@pytest.mark.parametrize("make", [MonoForward, DirectFeedbackAlignment, FeedbackAlignment])
def test_every_kind_of_rule_takes_the_batch(make: type[Rule]) -> None:
    network, batch = language_model(), {"input_ids": IDS, "labels": IDS}
    rule, twin = (make(network, batch, generator=torch.Generator().manual_seed(0))
                  for _ in range(2))
    assert torch.equal(rule(batch, None), twin({"input_ids": IDS}, next_tokens(IDS)))


@pytest.mark.parametrize(("kind", "labels"), [
    ("BertForSequenceClassification", torch.tensor([0, 2])), ("BertForMaskedLM", MASKED),
    ("BertForTokenClassification", MASKED % 3), ("BertLMHeadModel", IDS)])
def test_other_heads_are_held_against_their_own_labels(kind: str, labels: Tensor) -> None:
    network = classifier(kind)
    if kind == "BertForTokenClassification":
        labels = torch.where(MASKED == -100, MASKED, labels)
    loss, _ = exact(network, {"input_ids": IDS, "labels": labels})
    torch.testing.assert_close(Backprop(network)({"input_ids": IDS, "labels": labels}), loss)


def test_a_decoder_is_given_the_input_that_its_model_makes_of_the_labels() -> None:
    from transformers import T5Config, T5ForConditionalGeneration
    network = T5ForConditionalGeneration(T5Config(
        vocab_size=11, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, dropout_rate=0,
        decoder_start_token_id=0))
    batch = {"input_ids": IDS, "labels": IDS[:, :4].clone()}
    loss, _ = exact(network, batch)
    torch.testing.assert_close(Backprop(network)(batch), loss)


def test_a_network_that_does_not_continue_text_keeps_its_targets() -> None:
    network = nn.Embedding(11, 11)
    _, y = labels_apart(network, IDS, IDS)
    assert y is IDS


def test_a_loss_of_ones_own_is_given_all_heads_or_the_rule_refuses_them() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.body(x))
            return {"classes": self.first(h), "value": self.second(h)}

    def loss(output: dict[str, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return (nn.functional.cross_entropy(output["classes"], y[0])
                + nn.functional.mse_loss(output["value"], y[1]))

    network, x = Heads(), torch.randn(6, 4)
    y = torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 1)
    rule = Backprop(network, loss=loss)
    assert torch.equal(rule(x, y), loss(network(x), y).detach())
    assert network.second.weight.grad is not None
    assert rule.predict(x).keys() == {"classes", "value"}
    with pytest.raises(ValueError, match=r"network must return one tensor .* Backprop"):
        DirectFeedbackAlignment(network, x, loss=loss)


def test_a_batch_without_labels_says_what_is_missing() -> None:
    rule = Backprop(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r'y must hold the targets, got None and no "labels" in x'):
        rule(torch.randn(2, 4), None)


def test_heads_beside_the_logits_are_handed_on_too() -> None:
    from transformers import GPT2Config, GPT2DoubleHeadsModel
    network = GPT2DoubleHeadsModel(GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2))

    def loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return output["logits"].square().mean() + output["mc_logits"].square().mean()

    Backprop(network, loss=loss)({"input_ids": IDS.view(1, 2, 7)}, IDS)
    head = [p.grad for name, p in network.named_parameters() if "multiple_choice" in name]
    assert head
    assert all(gradient is not None for gradient in head)
    bare = language_model()
    seen = []
    Backprop(bare, loss=lambda output, y: seen.append(output) or output.mean())(IDS, IDS[:, :3])
    assert isinstance(seen[0], Tensor)
