"""Special tokens around texts are found for any post-processor, or refused; texts mention special tokens freely."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import BertProcessing, TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from distill_pl.errors import InputError
from distill_pl.tokenizer import end_of_text, special_tokens, text_encoder

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


def test_a_tokenizer_that_encodes_at_random_is_refused():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.1))
    with pytest.raises(InputError, match="encodes texts differently each time, by dropout 0.1: set it to null"):
        special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


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


PIECES = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "</", "s>"]
IDS = {piece: id for id, piece in enumerate(PIECES)}
MERGES = [("<", "/"), ("s", ">"), ("</", "s>")]
MODELS = {
    "BPE": models.BPE(IDS, MERGES[:2]),
    "BPE whose merges spell a special token": models.BPE(IDS, MERGES),
    "BPE of whole words": models.BPE(IDS, MERGES[:2], ignore_merges=True),
    "Unigram": models.Unigram([(piece, -8.0 if id > 1 else 0.0) for id, piece in enumerate(PIECES)]),
    "WordPiece": models.WordPiece(IDS | {f"##{piece}": id for id, piece in enumerate(PIECES[2:], len(PIECES))}, unk_token="?"),
    "WordLevel": models.WordLevel(IDS | {"\u0120ends": 300, "a": 301}, unk_token="?"),
}


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_that_a_text_mentions_are_plain_text(name):
    backend = Tokenizer(MODELS[name])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["  "])  # not special, as in vocabularies for code
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    before = backend.to_str()
    encoder = text_encoder(tokenizer)
    assert encoder.encode("a  s>a", add_special_tokens=False).ids == tokenizer.encode("a  s>a")[1:]
    ids = encoder.encode("a </s> ends <s> </s>a <pad>", add_special_tokens=False).ids
    assert not {0, 1, tokenizer.pad_token_id} & set(ids)
    if not name.startswith("Word"):
        assert encoder.decode(ids) == "a</s>ends<s></s>a<pad>"
    assert {0, 1} < set(tokenizer.encode("a </s>")) and backend.to_str() == before  # the tokenizer itself is as it was


@pytest.mark.parametrize("configured, end", [(None, 1), (1, 1), (8, 8), (3, 1), (99, 1), ([8, 1], 1)])
def test_a_text_ends_as_the_configuration_says_where_that_is_a_special_token(configured, end):
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert tokenizer.convert_tokens_to_ids("<end>") == 8
    assert end_of_text(tokenizer, LlamaConfig(eos_token_id=configured)) == end
