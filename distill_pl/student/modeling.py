"""The student as a Hugging Face model: the teacher's own architecture with a mixer where each layer had its attention.

Embeddings, norms, MLPs, rotary tables and the layers' residual wiring are the teacher's classes from transformers, so any
decoder whose layers are built like Llama's makes a student, and weight names are the teacher's. `import distill_pl` makes
`AutoModelForCausalLM.from_pretrained(folder)` know it.
"""

import copy
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from distill_pl.mixers import MIXERS, SequenceMixer
from distill_pl.student.cache import StudentCache

DECODER_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


class StudentConfig(PreTrainedConfig):
    """A teacher's configuration and what stands in place of its attention."""

    model_type = "distill_pl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    teacher: dict | None = None  # the teacher's own config.json
    mixer: str = "gla"
    softmax_layers: list[int] = field(default_factory=list)  # keep softmax attention: a hybrid
    shape: str = "copyable"
    rope: bool | None = None
    retention: float = 0.982
    backend: str = "auto"
    # the heads a mixer is shaped after: the teacher's, but for kv heads when they are expanded
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    # what generation and training code of others asks a config for
    vocab_size: int = 0
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class Student(PreTrainedModel, GenerationMixin):
    """A causal language model: tokens [B, T] -> logits [B, T, vocab]."""

    config: StudentConfig
    config_class = StudentConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        decoder = AutoModel.from_config(teacher_config(config), trust_remote_code=False)
        kept = copy.copy(config)
        kept.shape, kept.rope = "copyable", None
        for index, layer in enumerate(decoder.layers):
            keeps = index in config.softmax_layers
            layer.self_attn = MIXERS["softmax"](kept, index) if keeps else MIXERS[config.mixer](config, index)
        # its parts, not the decoder itself, whose own forward knows nothing of padding masks and states for mixers
        self.model = nn.ModuleDict({part: getattr(decoder, part) for part in DECODER_PARTS})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a StudentCache

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Random linears, then each mixer's own start. What was loaded stays: `start` sets through transformers' init."""
        super().initialize_weights()
        for mixer in self.mixers:
            mixer.start(self.config)

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The mixer of each layer."""
        return [layer.self_attn for layer in self.model.layers]

    def position(self, hidden: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """RoPE's (cos, sin) [B, T, K] for hidden [B, T, D] at position_ids [B, T], from 0 if not given."""
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.model.rotary_emb(hidden, position_ids)

    def hidden_states(self, input_ids: Tensor | None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                      cache: StudentCache | None = None, inputs_embeds: Tensor | None = None) -> Tensor:  # fmt: skip
        """[B, T] -> [B, T, D] after the final norm: what the head reads. attention_mask bool [B, T]."""
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position = self.position(hidden, position_ids)
        if torch.is_autocast_enabled(hidden.device.type):  # what all layers add to is half of the bytes that are moved
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=position, past_key_values=cache)
        return self.model.norm(hidden)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: StudentCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:  # fmt: skip
        """The interface of every causal language model in transformers.

        input_ids [B, T]; attention_mask [B, S], S = tokens in the cache + T, 0 where padded (on the left when generating);
        labels [B, T], shifted inside, -100 ignored; logits_to_keep: only the last so many positions (0: all).
        """
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = StudentCache(len(self.model.layers))
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = torch.arange(seen, seen + length, device=self.device)[None]
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        hidden = self.hidden_states(input_ids, mask, position_ids, past_key_values if use_cache else None, inputs_embeds)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)


def teacher_config(config: StudentConfig) -> PreTrainedConfig:
    """The teacher's configuration that a student's carries."""
    return AutoConfig.for_model(**(config.teacher or {}))


AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModelForCausalLM.register(StudentConfig, Student)
