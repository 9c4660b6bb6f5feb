"""MetaLA (Chou et al., 2024): linear attention whose key is one minus its decay: a channel takes in as much as it forgets.

    x' = silu(conv(x)), read by all projections;  g = logsigmoid(W_k x' + b) / 16, k = 1 - e^g
    A: ops/channel_decay.py
    after A v: + self-augmentation sigmoid((q . (w_aug * k)) v), LayerNorm per head, times silu(W_g x'), o_proj

The original's heads have half as many key channels as value channels, and no bias b, which section 3.1's start value needs.
"""

import math

import torch
from torch import nn
from torch.nn.functional import layer_norm, silu
from transformers import initialization

from distill_pl.mixers.mixer import Paper, SequenceMixer, unpadded
from distill_pl.mixers.short_conv import ShortConv, convolve
from distill_pl.ops import channel_decay

TEMPERATURE = 16  # divides the log gate, as in GLA


class MetaLA(SequenceMixer):
    """MetaLA with as many key channels as the teacher's heads have: q, v and o can be copied whole."""

    op = channel_decay
    decay_gate = True
    copies = ("q", "v", "o")
    paper = Paper(key=1 / 2)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.conv = ShortConv(hidden)
        self.decay_proj = nn.Linear(hidden, self.kv_count * self.key_dim)
        self.augmentation = nn.Parameter(torch.zeros(self.heads, self.key_dim))
        self.gate_proj = nn.Linear(hidden, self.heads * self.value_dim)
        self.eps = config.rms_norm_eps

    def start(self, config) -> None:
        """Set the convolution to the identity, the augmentation to 0 and b for a retention of `config.retention` per token."""
        self.conv.start()
        initialization.zeros_(self.augmentation)
        keep = config.retention**TEMPERATURE
        initialization.constant_(self.decay_proj.bias, math.log(keep / (1 - keep)))

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the K x V states and of the convolution's last tokens."""
        return super().state_bytes(batch, length, itemsize) + self.conv.state_bytes(batch, itemsize)

    def inputs(self, hidden, position, mask, state):
        """Project the convolved hidden to q, k = 1 - decay, v and the decay's logits; the key of a padded token is zero.

        The second result, for `output`, is the convolved hidden and q, k, v before RoPE.
        """
        (hidden,) = convolve({"hidden": self.conv}, [hidden[:, :, None]], mask, state, self.backend, [False])
        hidden = hidden.flatten(2)
        q, v = self.qv(hidden)
        g = self.decay_proj(hidden).unflatten(-1, (self.kv_count, -1))
        k = -channel_decay.log_decay(g, TEMPERATURE).expm1()
        k, v, g = (self.repeat_kv(x) for x in (k, v, g))
        k = unpadded(k, mask)
        read_by_output = (hidden, q, k, v)
        q, k = self.rotated(position, q, k)
        return channel_decay.Inputs(q, k, v, g, self.scale, self.backend, TEMPERATURE), read_by_output

    def output(self, mixed, read_by_output):
        """Add the self-augmentation, normalise each head and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        hidden, q, k, v = read_by_output
        augmented = mixed + torch.sigmoid((q * (self.augmentation * k)).sum(-1, keepdim=True) * v)
        # LayerNorm, not RMSNorm: subtracting the mean cancels the constant 1/2 that the sigmoid adds at the start
        normed = layer_norm(augmented.float(), (self.value_dim,), eps=self.eps).to(hidden.dtype)
        return normed.flatten(2) * silu(self.gate_proj(hidden))
