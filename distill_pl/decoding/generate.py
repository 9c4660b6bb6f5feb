"""Generation of whole texts by a Decoder, in place of `model.generate`."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_pl.decoding.decoder import Decoder, unsupported_reason

SUPPORTED_GENERATION_OPTIONS = {  # of a generation config: those that a Decoder follows or that change nothing here
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "use_cache",
    "max_length", "max_new_tokens",
}  # fmt: skip


def continue_prompt(model: PreTrainedModel, prompt: Tensor, max_new_tokens: int, temperature: float) -> Tensor | None:
    """Continue a prompt [1, T] by n tokens as `model.generate` does -> [1, T + n].

    n is `max_new_tokens`, or less after an end token. Returns None if a Decoder does not support the model or an option of its
    generation config. The step is captured but not compiled: compiling takes longer than generating some thousand tokens.
    """
    options = model.generation_config
    length = prompt.shape[1] + max_new_tokens
    changed = {  # a float of 1, such as repetition_penalty's, is neutral
        name for name, value in options.to_diff_dict().items()
        if not (name.startswith("_") or value is None or value is False or (isinstance(value, float) and value == 1))
    }  # fmt: skip
    if not changed <= SUPPORTED_GENERATION_OPTIONS or unsupported_reason(model, length):
        return None
    end_tokens = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    top_k = 50 if options.top_k is None else options.top_k  # transformers' own default
    tokens = [prompt]
    for token in Decoder(model, length, temperature, top_k, backend=None).generate(prompt, max_new_tokens):
        tokens.append(token)
        if token.item() in end_tokens:
            break
    return torch.cat(tokens, 1)
