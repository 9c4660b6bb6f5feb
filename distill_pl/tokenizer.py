"""Find out what a tokenizer puts around every text."""

from transformers import PreTrainedTokenizerBase

from distill_pl.errors import InputError

PROBES = ("a", "b c", "The fox.")  # texts to encode, before words of the vocabulary itself
WORDS = 8


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text, such as BOS and EOS; empty lists for none.

    They are what encoding a text with special tokens adds to encoding it without, the same for several texts.

    Raises:
        InputError: what is added is not the same for every text, or surrounds no text that the tokenizer can encode.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))[:WORDS]
    found: list[set[tuple[tuple[int, ...], tuple[int, ...]]]] = []
    for text in (*PROBES, *(tokenizer.decode([id]) for id in ids)):
        plain, whole = (tuple(tokenizer.encode(text, add_special_tokens=special)) for special in (False, True))
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
