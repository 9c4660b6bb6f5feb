"""Token-by-token generation at the memory speed of a GPU: fixed buffers, fused layers, one CUDA graph a step."""

from distill_pl.decoding.decoder import Decoder, unsupported_reason
from distill_pl.decoding.generate import continue_prompt

__all__ = ["Decoder", "continue_prompt", "unsupported_reason"]
