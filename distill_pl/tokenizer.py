"""Find what a tokenizer puts around texts and what ends them, and encode texts alone: whole, and never as special tokens."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_pl.errors import InputError, one_line

PROBES = ("a", "b c", "The fox.")  # texts to encode, before words of the vocabulary itself
WORDS = 8


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


def end_of_text(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """Return the id that ends each text: the special token with which the model's configuration ends texts, or EOS.

    They differ in base models whose tokenizer is that of the chat model: its EOS ends a turn, which the base model never saw.
    Where the configuration has several such tokens, none, or one that is an ordinary word, the tokenizer's EOS counts.
    """
    token = tokenizer.added_tokens_decoder.get(config.eos_token_id) if isinstance(config.eos_token_id, int) else None
    return config.eos_token_id if token is not None and token.special else tokenizer.eos_token_id


def around_documents(tokenizer: PreTrainedTokenizerBase, end: int) -> tuple[list[int], list[int]]:
    """Return the ids that are packed before and after each document: the tokenizer's own, and `end` once.

    `end` is left out where it, or the tokenizer's EOS, is one of them. Raises InputError as `special_tokens` does.
    """
    before, after = special_tokens(tokenizer)
    return before, after if {end, tokenizer.eos_token_id} & {*before, *after} else [*after, end]


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer of a fast tokenizer, without a length limit or padding, and blind to special tokens.

    A special token that a text merely mentions, such as `<|endoftext|>` in a manual, is encoded as the characters it is
    written with. Encode with `add_special_tokens=False`: the copy's own special tokens may have other names.

    Raises:
        InputError: the tokenizer is not a fast one.
    """
    if not (original := getattr(tokenizer, "backend_tokenizer", None)):
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} is not a fast one: it needs a tokenizer.json")
    described = original.to_str()
    special = {token.content for token in original.get_added_tokens_decoder().values() if token.special}
    if any(original.model.token_to_id(name) is not None for name in special):
        described = json.dumps(_hidden(special, json.loads(described)))
    encoder = type(original).from_str(described)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _hidden(special: set[str], fields: dict) -> dict:
    """Rename special tokens in the fields of a tokenizer.json, ids unchanged, to what no text holds.

    `encode_special_tokens` does not suffice where the model's own vocabulary has them: a Unigram model takes them for its
    likeliest pieces, and other models for words or for what their merges spell.
    """
    model, vocabulary = fields["model"], fields["model"]["vocab"]
    names = {name: f"\0{name}" for name in special if name != model.get("unk_token")}
    for token in fields["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    return fields
