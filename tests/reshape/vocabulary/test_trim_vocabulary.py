import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import changes, trim_vocabulary
from netwright.reshape.vocabulary.trim_vocabulary import Letters
from netwright.signals import call

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = ("the quick brown fox jumps over the lazy dog while seven "
         "wizards quietly box with exceptional zeal and many more "
         "words fill this corpus so that pairs are merged")
PLAIN = WORDS.split()
CORPUS = [" ".join(PLAIN[i:i + 6]) for i in range(len(PLAIN) - 5)] * 3
TEXTS = ["the quick brown fox", "seven wizards box", "the lazy dog jumps", "so many words",
         "fox and dog", "quick zeal"]
OTHER = ["exceptional corpus pairs", "this café ☃ is new", "Zebra!"]


def byte_level():
    """A byte-level BPE, as GPT-2's and Llama's are."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def word_piece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.train_from_iterator(CORPUS, tokenizers.trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False))
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")


def unigram():
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.train_from_iterator(CORPUS, tokenizers.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<pad>"], unk_token="<unk>",
        show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def causal(size, *, tied, kind="llama"):
    torch.manual_seed(0)
    said = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
            "tie_word_embeddings": tied}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, **said)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **said)).eval()


def bert(tokenizer, kind):
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_model_gives_what_it_gave_in_the_new_numbers(kind, tied, tmp_path):
    tokenizer = byte_level()
    model = causal(len(tokenizer) + 7, tied=tied, kind=kind)  # rows that no token has
    small = trim_vocabulary(model, tokenizer, TEXTS, other_texts=OTHER)
    kept = torch.tensor(changes(small)[0].decision["kept"])
    assert len(kept) == small.config.vocab_size == len(small.tokenizer) < len(tokenizer)
    for text in TEXTS:
        before, after = (torch.tensor([t(text)["input_ids"]]) for t in (tokenizer,
                                                                        small.tokenizer))
        assert torch.equal(kept[after], before)
        assert small.tokenizer.decode(after[0], skip_special_tokens=True) == text
        assert torch.allclose(call(small, after), call(model, before)[..., kept], atol=1e-6)
    shared = small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert shared == tied
    assert small.config.eos_token_id == small.tokenizer.eos_token_id
    assert small.generation_config.pad_token_id == small.tokenizer.pad_token_id
    for text in OTHER:  # any byte can still be written
        ids = small.tokenizer(text)["input_ids"]
        assert small.tokenizer.decode(ids, skip_special_tokens=True) == text
    nw.save(small, tmp_path)
    ids = torch.tensor([small.tokenizer(TEXTS[0])["input_ids"]])
    for again in (nw.load(tmp_path), type(model).from_pretrained(tmp_path).eval()):
        assert torch.equal(call(again, ids), call(small, ids))
    loaded = nw.load(tmp_path).tokenizer
    assert [loaded(t)["input_ids"] for t in TEXTS + OTHER] == [
        small.tokenizer(t)["input_ids"] for t in TEXTS + OTHER]
    assert small.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("make", [word_piece, unigram])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_an_encoder_gives_what_it_gave(make, kind, tmp_path):
    tokenizer = make()
    model = bert(tokenizer, kind)
    small = trim_vocabulary(model, tokenizer, TEXTS)
    kept = changes(small)[0].decision["kept"]
    before, after = (t(TEXTS, padding=True, return_tensors="pt") for t in (tokenizer,
                                                                           small.tokenizer))
    names = ("input_ids", "attention_mask")
    old, new = (call(m, {name: x[name] for name in names}) for m, x in ((model, before),
                                                                        (small, after)))
    assert torch.allclose(new, old[..., kept] if kind == "BertForMaskedLM" else old, atol=1e-5)
    assert small.tokenizer.pad_token_id == small.config.pad_token_id == (
        small.get_input_embeddings().padding_idx)
    nw.save(small, tmp_path)
    again = nw.load(tmp_path)
    x = {name: after[name] for name in names}
    assert torch.equal(call(again, x), call(small, x))
    assert again.tokenizer(OTHER)["input_ids"] == small.tokenizer(OTHER)["input_ids"]


def test_what_becomes_of_other_text_is_on_record():
    tokenizer = byte_level()
    model = causal(len(tokenizer), tied=True)
    given = trim_vocabulary(model, tokenizer, TEXTS, other_texts=[*TEXTS, *OTHER])
    said = changes(given)[0].decision["other_text"]
    assert said["texts"] == said["written"] == len(TEXTS) + len(OTHER)
    assert said["cut as before"] >= len(TEXTS) / (len(TEXTS) + len(OTHER))
    assert said["tokens"] > 1
    assert said["nats"] > 1
    same = trim_vocabulary(model, tokenizer, TEXTS, other_texts=TEXTS)
    assert changes(same)[0].decision["other_text"] | {"nats": 1.0} == {
        "texts": 6, "written": 6, "cut as before": 1.0, "tokens": 1.0, "nats": 1.0}
    held = changes(trim_vocabulary(model, tokenizer, TEXTS))[0].decision["other_text"]
    assert held["texts"] == 1
    assert held["tokens"] > 1  # "fox and dog" as if it had not been given


def test_a_tokenizer_of_the_library_and_one_of_letters(tmp_path):
    plain = byte_level().backend_tokenizer
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(plain.get_vocab_size(), 8), nn.Linear(8, 3))
    small = trim_vocabulary(model, plain, TEXTS)
    before, after = plain.encode(TEXTS[0]), small.tokenizer.encode(TEXTS[0])
    assert before.tokens == after.tokens
    assert torch.equal(small(torch.tensor(after.ids)), model(torch.tensor(before.ids)))
    nw.save(small, tmp_path)
    again = nw.load(tmp_path, model)
    assert again.tokenizer.encode(TEXTS[1]).ids == small.tokenizer.encode(TEXTS[1]).ids

    few = trim_vocabulary(gpt(20, context=8, width=16, depth=1, heads=2), Letters(), ["cab"])
    assert few.tokenizer.encode("abc") == [0, 1, 2]
    with pytest.raises(ValueError, match="tokens that were kept, got token 3"):
        few.tokenizer.encode("d")


def test_it_trains_and_is_reshaped_again():
    tokenizer = byte_level()
    small = trim_vocabulary(causal(len(tokenizer), tied=True), tokenizer, TEXTS)
    ids = torch.tensor([small.tokenizer(TEXTS[0])["input_ids"]])
    small.train()(ids, labels=ids).loss.backward()
    assert small.get_input_embeddings().weight.grad.any()
    less = nw.reshape.prune_sublayers(small, ids, 1)
    assert less.tokenizer is not None
    smaller = trim_vocabulary(small, small.tokenizer, TEXTS[:2])
    assert smaller.config.vocab_size < small.config.vocab_size


def test_what_is_refused():
    tokenizer = byte_level()
    model = causal(len(tokenizer), tied=True)
    with pytest.raises(ValueError, match="texts must be a list"):
        trim_vocabulary(model, tokenizer, [])
    with pytest.raises(ValueError, match="texts must be a list"):
        trim_vocabulary(model, tokenizer, "the quick brown fox")
    with pytest.raises(NothingToReshape, match="no embedding of"):
        trim_vocabulary(nn.Sequential(nn.Embedding(5, 3)), tokenizer, TEXTS)
    small = trim_vocabulary(model, tokenizer, TEXTS)
    with pytest.raises(NothingToReshape, match=r"all .* tokens of the model are kept"):
        trim_vocabulary(small, small.tokenizer, TEXTS)
