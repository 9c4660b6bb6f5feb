"""Make what the quickstart starts from, without a download: text, a tokenizer trained on it, and a small random Llama.

The text is short stories put together from sentences below, so that a model which trains for minutes can learn to write them.
Names, things and places come back later in each story, which a model can only know by remembering them. Writes
runs/quickstart/text.jsonl and runs/quickstart/untrained/.
"""

import json
import random
import re
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("runs/quickstart")
END = "<|endoftext|>"
STORIES = 16_000

WORDS = {
    "name": "Tilda Oscar Mina Bruno Pia Felix Nora Hugo Edda Anton Lotte Emil Clara Otto Frida Karl Ida Paul Rosa Max".split(),
    "animal": "fox hare mole hen goat duck mouse bear badger owl frog hedgehog".split(),
    "kind": "small old young clever shy cheerful tired brave quiet curious".split(),
    "thing": "lamp kite key drum ball book coat clock boat basket bell ladder".split(),
    "color": "red blue green yellow white brown silver striped".split(),
    "home": ["by the river", "at the edge of the wood", "on a green hill", "near the mill", "behind the old barn",
             "in a house with a crooked roof", "next to the bridge"],
    "place": ["under the bridge", "behind the oven", "in the tall grass", "at the bottom of the well", "on the roof",
              "in the attic", "between two stones", "in a hollow tree", "below the stairs", "at the market"],
    "weather": "rainy windy sunny cold foggy warm snowy".split(),
    "food": ["apple cake", "onion soup", "warm bread", "plum jam", "honey biscuits", "carrot stew"],
    "feeling": "happy glad proud relieved thankful".split(),
    "sad": "sad worried upset lonely".split(),
}  # fmt: skip

BEGIN = [
    "Once there was a {kind} {animal} named {name} who lived {home}.",
    "{name} was a {kind} {animal} who lived {home}.",
    "A long time ago, a {kind} {animal} named {name} lived {home}.",
]
FRIEND = [
    "{name} had a friend, a {kind2} {animal2} named {name2}.",
    "Not far away lived a {kind2} {animal2} named {name2}, and the two were good friends.",
]
LOST = [
    ["{name} had a {color} {thing} and was very fond of it.", "Of all things, {name} liked a {color} {thing} best."],
    ["One {weather} morning the {thing} was gone.", "But one {weather} day {name} could not find the {thing}."],
    ["{name} looked {place2}, but it was not there.", "{name} looked {place2} and {place3}, and found nothing.",
     "It was not {place2}, and it was not {place3}."],
    ["{name} was {sad} and began to cry.", "{name} felt {sad}."],
    ['"Have you seen my {color} {thing}?" asked {name}.', '"I have lost my {thing}," said {name} to {name2}.'],
    ['"No," said {name2}, "but I will help you look."', '"We will find it," said {name2}. "Come with me."'],
    ["Together they looked everywhere, and at last {name2} found the {thing} {place}.",
     "They walked for a long time. Then {name2} saw something {color} {place}. It was the {thing}!"],
    ["{name} was so {feeling} that {name2} got a piece of {food}.", '"Thank you, {name2}," said {name}, and they ate {food}.'],
]  # fmt: skip
VISIT = [
    ["One {weather} day {name} wanted to visit {name2}.",
     "It was a {weather} day, and {name} had an idea. It was time to see {name2}."],
    ["{name} put some {food} and a {color} {thing} into a bag and set out.", "{name} packed {food} and a {color} {thing}."],
    ["The way was long, and the path was hard to see.", "On the way {name} met a {animal3} who did not know the way either."],
    ["{name} rested {place} and wondered what {name2} was doing.", "Soon {name} was {sad}, for nothing looked as it should."],
    ['"Are you lost?" asked a {animal3} {place2}. "The house of {name2} is right there."',
     "Then {name} heard {name2} singing {place2}."],
    ['"How good to see you, {name}!" said {name2}.', '{name2} opened the door. "Come in, {name}!"'],
    ["{name} gave {name2} the {color} {thing}, and they shared the {food}.",
     "They ate the {food}, and {name2} was {feeling} about the {thing}."],
    ["When it was dark, {name} went home to sleep.", "That night {name} stayed with {name2}."],
]  # fmt: skip
QUARREL = [
    ["{name} and {name2} found a {color} {thing} {place}.",
     "One {weather} day {name} and {name2} saw a {color} {thing} {place}."],
    ['"It is mine," said {name}. "I saw it first."', '"I want the {thing}," said {name}.'],
    ['"No, it is mine," said {name2}, and ran away with it.', '"You always want everything," said {name2}, and went home.'],
    ["For three days they did not speak, and both were {sad}.", "{name} sat alone {place2} and felt {sad}. So did {name2}."],
    ["Then {name} cooked {food} and knocked at the door of {name2}.", "On the fourth day {name2} came with {food}."],
    ['"I am sorry," said {name}.', '"Let us not fight about a {thing}," said {name}.'],
    ['"I am sorry too," said {name2}. "The {thing} can be ours."', '"You are right," said {name2}. "Here is the {thing}."'],
    ["They kept the {color} {thing} {place3}, and nobody fought about it again.",
     "From that day on they shared the {thing}, and were {feeling}."],
]  # fmt: skip


def story(chance: random.Random) -> str:
    """Tell a story: choose one of three plots, a wording of each of its sentences, and the words in them."""
    words = {}
    for kind, choices in WORDS.items():
        for number, word in zip(("", "2", "3"), chance.sample(choices, min(3, len(choices))), strict=False):
            words[kind + number] = word
    sentences = [BEGIN, FRIEND, *chance.choice([LOST, VISIT, QUARREL])]
    text = " ".join(chance.choice(wordings).format(**words) for wordings in sentences)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def main() -> None:
    """Write the files, unless they exist: a run that is resumed must read the same bytes."""
    untrained = FOLDER / "untrained"
    if untrained.is_dir():
        return
    transformers.utils.logging.disable_progress_bar()
    FOLDER.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    texts = [story(chance) for _ in range(STORIES)]
    with open(FOLDER / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    aside = untrained.with_name("untrained.new")
    LlamaForCausalLM(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(untrained)
    print(f"{sum(map(len, texts)) / 1e6:.1f} MB of stories in {FOLDER}")


if __name__ == "__main__":
    main()
