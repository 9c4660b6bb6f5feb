"""Generate token by token at a GPU's memory speed: fixed buffers, fused layers, one CUDA graph a step."""
