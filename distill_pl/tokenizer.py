"""Find the special tokens that a tokenizer puts around texts, and encode texts without truncation or special tokens in them."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_pl.errors import InputError, one_line

PROBES = ("a", "b c", "The fox.")  # texts to encode when looking for special tokens
WORDS = 8  # entries of the vocabulary that are encoded as well


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text, such as BOS and EOS; empty lists for none.

    Several texts are encoded with and without special tokens; the ids returned are the difference.

    Raises:
        InputError: the difference is not the same for all texts, or the tokenizer cannot encode one of them, or encodes a text
            differently each time.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} encodes texts differently each time, by dropout {dropout:g}: set it to null "
            "in its tokenizer.json"
        )

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
        if plain:  # around an empty text, before and after cannot be told apart
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
    """Return the id that ends each text: the configuration's eos_token_id if it is one special token, else the tokenizer's EOS.

    The two differ in base models with the tokenizer of a chat model, whose EOS ends a turn and never occurred in pretraining.
    """
    token = tokenizer.added_tokens_decoder.get(config.eos_token_id) if isinstance(config.eos_token_id, int) else None
    return config.eos_token_id if token is not None and token.special else tokenizer.eos_token_id


def around_documents(tokenizer: PreTrainedTokenizerBase, end: int) -> tuple[list[int], list[int]]:
    """Return the ids that are packed before and after each document: the tokenizer's special tokens, and `end` after them.

    `end` is not added if it or the tokenizer's EOS is among the special tokens. Raises InputError if the special tokens are not
    the same for every text.
    """
    before, after = special_tokens(tokenizer)
    return before, after if {end, tokenizer.eos_token_id} & {*before, *after} else [*after, end]


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer of a fast tokenizer, without length limit or padding, and without recognising special tokens.

    A special token within a text, such as `<|endoftext|>` in a manual, is encoded as plain characters. Encode with
    `add_special_tokens=False`: the copy's own special tokens may have other names.

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


def keeps_all_characters(encoder: Tokenizer) -> bool:
    """Return whether a tokenizer encodes a character that no vocabulary holds, by bytes or an unknown token, or refuses it."""
    try:
        return len(encoder.encode("\U0010fffd", add_special_tokens=False).ids) > 0
    except Exception:  # the Rust library has no error of its own; with a text that has such a character, packing ends with it
        return True


def _hidden(special: set[str], fields: dict) -> dict:
    """Rename special tokens in the fields of a tokenizer.json, ids unchanged, to names with code points that no text has.

    `encode_special_tokens` does not suffice if the model's own vocabulary contains special tokens: a Unigram model would use
    them as likely pieces, other models as words or as results of merges.
    """
    model, vocabulary = fields["model"], fields["model"]["vocab"]
    names = {name: f"\ufdd0{name}" for name in special if name != model.get("unk_token")}
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
