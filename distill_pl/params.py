"""SmolLM-360M, the study's teacher, as numbers: to build its students without a download."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def smollm_360m() -> SimpleNamespace:
    """What a StudentFactory reads of a teacher, its weights on the meta device."""
    config = LlamaConfig(
        hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, head_dim=64,
        intermediate_size=2560, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return SimpleNamespace(config=config, model=LlamaForCausalLM(config))
