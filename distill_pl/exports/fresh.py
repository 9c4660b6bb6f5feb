"""Compare an exported folder with its student in a fresh process, in which only `remote` can import this package.

Run as `python fresh.py FOLDER EXPECTED transformers`, with the tensors of `expectation` in the file EXPECTED. It prints one
line of JSON: the largest difference of the logits as a share of the largest logit, the student's own rounding by the same
measure, and how many of the generated tokens are equal before the first that is not. In place of `transformers`, `remote`
loads the folder's own module, which imports this package, and `fla` a class of flash-linear-attention, on a GPU if there is
one.
"""

import json
import sys
from typing import Any

# kernels for GPUs, which some classes of transformers call on a CPU as well where they are installed
GPU_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
PROMPT, GENERATED = 32, 50  # tokens


def expectation(model: Any) -> dict[str, Any]:
    """Compute what a model must still compute once exported: tensors prompt [1, T], logits [1, T, vocab], tokens [1, T + 50].

    The prompt is drawn at random and continued greedily, without an end. Another tensor, `rounding`, is how far logits are
    from those of the prompt read token by token, as a share of the largest: layers that divide by a small sum enlarge rounding.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    found = answer(model, prompt)
    logits: list[Any] = []
    known: dict[str, Any] = {}  # the cache, under the name that the model gives it
    with torch.no_grad():
        for token in prompt.split(1, dim=1):
            output = model(token, **known, use_cache=True)
            known = {name: output[name] for name in ("cache", "past_key_values") if name in output}
            logits.append(output.logits)
    return {"prompt": prompt, "rounding": difference(torch.cat(logits, 1), found["logits"]), **found}


def difference(logits: Any, expected: Any) -> Any:
    """Return the largest difference of logits as a share of the largest expected one, a tensor []."""
    return (logits - expected).abs().max() / expected.abs().max()


def answer(model: Any, prompt: Any) -> dict[str, Any]:
    """Compute a model's logits of a prompt [1, T] and its greedy continuation by 50 tokens."""
    import torch

    model.eval()
    with torch.no_grad():
        logits = model(prompt).logits.float()
    options = {"do_sample": False, "num_beams": 1, "min_new_tokens": GENERATED, "max_new_tokens": GENERATED}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    return {"logits": logits, "tokens": tokens}


def tune_nothing() -> None:
    """Let each Triton kernel defined from now on have one configuration: fla times up to 48 at a first call, for minutes."""
    from triton.runtime.autotuner import Autotuner

    begin: Any = Autotuner.__init__

    def begin_with_one(self: Any, kernel: Any, names: Any, configs: list[Any], *args: Any, **options: Any) -> None:
        begin(self, kernel, names, sorted(configs, key=lambda config: abs(config.num_warps - 4))[:1], *args, **options)

    Autotuner.__init__ = begin_with_one  # type: ignore[method-assign]


def main(folder: str, expected_file: str, to: str) -> None:
    """Load a folder's model in fp32, on the CPU but for `fla`, and print how far it is from what `expected_file` says."""
    for package in (() if to == "fla" else GPU_PACKAGES) + (() if to == "remote" else ("distill_pl",)):
        sys.modules[package] = None  # type: ignore[assignment]  # what Python documents to make an import fail
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if to == "fla":
        tune_nothing()
        import fla.models  # noqa: F401  registers its classes
    device = "cuda" if to == "fla" and torch.cuda.is_available() else "cpu"
    expected = load_file(expected_file, device=device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=to == "remote")
    model = model.to(device)
    found = answer(model, expected["prompt"])
    error = difference(found["logits"], expected["logits"]).item()
    equal = (found["tokens"] == expected["tokens"])[0, expected["prompt"].shape[1] :].long().cumprod(0).sum()
    measured = {"logits": error, "rounding": expected["rounding"].item(), "tokens": int(equal)}
    print(json.dumps({"model": type(model).__name__, **measured}))


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose fla.py is not the package fla
    main(*sys.argv[1:4])
