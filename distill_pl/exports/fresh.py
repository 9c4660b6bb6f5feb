"""Compare an exported folder with its student in a fresh process, in which this package cannot be imported.

Run as `python -I fresh.py FOLDER EXPECTED`, with the tensors of `expectation` in the file EXPECTED, it prints one line of JSON:
the largest difference of the logits as a share of the largest logit, and how many of the generated tokens are equal before the
first that is not. With `remote` as a third argument it loads the folder's own module, which imports this package.
"""

import json
import os
import sys
from typing import Any

# kernels for GPUs, which some classes of transformers call on a CPU as well where they are installed
GPU_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
PROMPT, GENERATED = 32, 50  # tokens


def expectation(model: Any) -> dict[str, Any]:
    """Compute what a model must still compute once exported -> tensors prompt [1, T], logits [1, T, vocab], tokens [1, T + 50].

    The prompt is drawn at random and continued greedily, without an end.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return {"prompt": prompt, **answer(model, prompt)}


def answer(model: Any, prompt: Any) -> dict[str, Any]:
    """Compute a model's logits of a prompt [1, T] and its greedy continuation by 50 tokens."""
    import torch

    model.eval()
    with torch.no_grad():
        logits = model(prompt).logits.float()
    options = {"do_sample": False, "num_beams": 1, "min_new_tokens": GENERATED, "max_new_tokens": GENERATED}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    return {"logits": logits, "tokens": tokens}


def main(folder: str, expected_file: str, remote: bool) -> None:
    """Load a folder's model in fp32 on the CPU and print how far it is from what `expected_file` says."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for package in GPU_PACKAGES if remote else (*GPU_PACKAGES, "distill_pl"):
        sys.modules[package] = None  # type: ignore[assignment]  # what Python documents to make an import fail
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(expected_file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote)
    found = answer(model, expected["prompt"])
    difference = (found["logits"] - expected["logits"]).abs().max() / expected["logits"].abs().max()
    equal = (found["tokens"] == expected["tokens"])[0, expected["prompt"].shape[1] :].long().cumprod(0).sum()
    print(json.dumps({"model": type(model).__name__, "logits": difference.item(), "tokens": int(equal)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], remote="remote" in sys.argv[3:])
