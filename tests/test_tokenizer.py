"""What a tokenizer puts around every text is found for any post-processor, or refused; texts mention special tokens freely."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import BertProcessing, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from distill_pl.errors import InputError
from distill_pl.tokenizer import special_tokens, text_encoder

VOCABULARY = {"<s>": 0, "</s>": 1, "<unk>": 2, **{word: id for id, word in enumerate("the fox sees a dog".split(), 3)}}
SPECIAL = [("<s>", 0), ("</s>", 1)]


def make(post_processor=None):
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor:
        backend.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "post_processor, expected",
    [
        (None, ([], [])),
        (TemplateProcessing(single="<s> $A", special_tokens=SPECIAL), ([0], [])),
        (TemplateProcessing(single="$A </s>", special_tokens=SPECIAL), ([], [1])),
        (TemplateProcessing(single="<s> </s> $A </s> </s>", special_tokens=SPECIAL), ([0, 1], [1, 1])),
        (BertProcessing(("</s>", 1), ("<s>", 0)), ([0], [1])),
        (TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)]), ([2], [])),  # also encodes what is unknown
    ],
)
def test_special_tokens_of_every_post_processor(post_processor, expected):
    assert special_tokens(make(post_processor)) == expected


def test_a_tokenizer_that_knows_only_its_own_words():
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "x": 2}, merges=[]))  # all else is dropped
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=SPECIAL)
    assert special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")) == ([0], [])


@pytest.mark.parametrize(
    "tokenizer",
    [
        make(TemplateProcessing(single="$A </s> $A", special_tokens=SPECIAL)),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>"),
    ],
    ids=["the text twice", "no vocabulary"],
)
def test_special_tokens_that_cannot_be_told_apart_are_refused(tokenizer):
    with pytest.raises(InputError, match="does not put the same special tokens .*post_processor") as caught:
        special_tokens(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_encode_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0}, unk_token="absent")))
    with pytest.raises(InputError, match="cannot encode 'a' .*give it an unk_token"):
        special_tokens(tokenizer)


def byte_level(vocabulary_model):
    backend = Tokenizer(vocabulary_model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


SPECIAL_AND_BYTES = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({piece: id for id, piece in enumerate(SPECIAL_AND_BYTES)}, merges=[]),
        models.Unigram([(piece, -8.0 if id > 1 else 0.0) for id, piece in enumerate(SPECIAL_AND_BYTES)]),
    ],
    ids=["BPE", "Unigram"],
)
def test_special_tokens_that_a_text_mentions_are_plain_text(model):
    tokenizer, text = byte_level(model), "a </s> ends<s> a text</s>"
    assert {0, 1} < set(tokenizer.encode(text))
    encoder = text_encoder(tokenizer)
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert not {0, 1} & set(ids) and encoder.decode(ids) == text
    assert {0, 1} < set(tokenizer.encode(text))  # the tokenizer itself is as it was
