"""Find out what a tokenizer puts around every text, and encode texts alone: whole, and never as special tokens."""

import json

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from distill_pl.errors import InputError, one_line

PROBES = ("a", "b c", "The fox.")  # texts to encode, before words of the vocabulary itself
WORDS = 8
IMPOSSIBLE = -1e6  # log probability of a piece that any others are better than


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text, such as BOS and EOS; empty lists for none.

    They are what encoding a text with special tokens adds to encoding it without, the same for several texts.

    Raises:
        InputError: what is added is not the same for every text, or surrounds no text that the tokenizer can encode.
    """

    def encode(text: str, special: bool) -> tuple[int, ...]:
        try:
            return tuple(tokenizer.encode(text, add_special_tokens=special))
        except Exception as error:  # the Rust library has no error of its own
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r} cannot encode {text!r} ({one_line(error)}): give it an unk_token"
            ) from error

    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))[:WORDS]
    found: list[set[tuple[tuple[int, ...], tuple[int, ...]]]] = []
    for text in (*PROBES, *(str(tokenizer.decode([id])) for id in ids)):
        plain, whole = (encode(text, special) for special in (False, True))
        starts = range(len(whole) - len(plain) + 1)
        if plain:  # around no text, before and after are one
            end = len(plain)
            found.append({(whole[:i], whole[i + end :]) for i in starts if whole[i : i + end] == plain})
    common = set.intersection(*found) if found else set()
    if len(common) != 1:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} does not put the same special tokens before and after every text: give its "
            "tokenizer.json a post_processor that does, or none"
        )
    before, after = common.pop()
    return list(before), list(after)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer of a fast tokenizer, without a length limit or padding, and blind to special tokens.

    A special token that a text merely mentions, such as `<|endoftext|>` in a manual, is encoded as the characters it is
    written with. The copy's own special tokens are to be left out (`add_special_tokens=False`).

    Raises:
        InputError: the tokenizer is not a fast one.
    """
    if not (original := getattr(tokenizer, "backend_tokenizer", None)):
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} is not a fast one: it needs a tokenizer.json")
    described = original.to_str()
    if isinstance(original.model, models.Unigram):  # its vocabulary holds the special tokens as its likeliest pieces
        fields = json.loads(described)
        for token in fields["added_tokens"]:
            if token["special"] and token["id"] < len(fields["model"]["vocab"]):
                fields["model"]["vocab"][token["id"]][1] = IMPOSSIBLE
        described = json.dumps(fields)
    encoder = type(original).from_str(described)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder
