"""The student as a Hugging Face model: the teacher's architecture with a mixer in place of each layer's attention.

Embeddings, norms, MLPs, rotary embedding and the layers' residual connections are the teacher's classes from transformers, so
any decoder whose layers are built like Llama's can become a student, and weights keep the teacher's names. `import distill_pl`
registers the model with `AutoModelForCausalLM.from_pretrained(folder)`.
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
    """The configuration of a student: the teacher's, the mixer in place of its attention, and the mixer's sizes."""

    model_type = "distill_pl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    teacher: dict | None = None  # the teacher's config.json
    mixer: str = "gla"
    softmax_layers: list[int] = field(default_factory=list)  # layers that keep softmax attention
    shape: str = "copyable"
    rope: bool | None = None
    retention: float = 0.982
    backend: str = "auto"
    # the sizes from which mixers are built: the teacher's, except that num_key_value_heads may be expanded to all heads
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    # read by transformers' generation and by training code outside this package
    vocab_size: int = 0
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class Student(PreTrainedModel, GenerationMixin):
    """A causal language model of the teacher's architecture with mixers as attention: tokens [B, T] -> logits [B, T, vocab].

    Names that transformers calls private stand here and in `mark_as_loaded` alone; tests/test_private_apis.py checks them.
    """

    config: StudentConfig
    config_class = StudentConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False, lest `generate` makes a DynamicCache: `forward` makes a StudentCache."""
        return False

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        decoder = AutoModel.from_config(teacher_config(config), trust_remote_code=False)
        softmax_config = copy.copy(config)
        softmax_config.shape, softmax_config.rope = "copyable", None
        for index, layer in enumerate(decoder.layers):
            keeps_softmax = index in config.softmax_layers
            layer.self_attn = MIXERS["softmax"](softmax_config, index) if keeps_softmax else MIXERS[config.mixer](config, index)
        # the decoder's parts and not the decoder, whose forward would build attention masks and a cache that mixers do not take
        self.model = nn.ModuleDict({part: getattr(decoder, part) for part in DECODER_PARTS})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw linears and embeddings at random, then set each mixer's start values; leave loaded weights as they are."""
        super().initialize_weights()
        for mixer in self.mixers:
            mixer.start(self.config)

    @property
    def mixers(self) -> list[SequenceMixer]:
        """Return the mixers, one for each layer."""
        return [layer.self_attn for layer in self.model.layers]

    def position(self, hidden: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute RoPE's cos and sin [B, T, K] for hidden [B, T, D] at position_ids [B, T], by default 0 to T - 1."""
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.model.rotary_emb(hidden, position_ids)

    def hidden_states(self, input_ids: Tensor | None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                      cache: StudentCache | None = None, inputs_embeds: Tensor | None = None) -> Tensor:  # fmt: skip
        """Compute the output of the final norm, which lm_head reads: input_ids [B, T] -> [B, T, D].

        attention_mask bool [B, T] is False where padded; inputs_embeds [B, T, D] replaces input_ids; cache is updated.
        """
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position = self.position(hidden, position_ids)
        if torch.is_autocast_enabled(hidden.device.type):  # a residual stream in bf16 moves half the bytes
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=position, past_key_values=cache)
        return self.model.norm(hidden)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: StudentCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:  # fmt: skip
        """Compute logits [B, T, vocab] and, if labels are given, the loss, by the interface of transformers' causal models.

        input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, S], where S counts the tokens in the cache and these T,
        is 0 where padded (on the left when generating); labels [B, T] are shifted here, and -100 is ignored; logits_to_keep
        is the number of last positions to compute logits for (0: all), or an index of positions.
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
    """Return the teacher's configuration, which is stored in the student's."""
    return AutoConfig.for_model(**(config.teacher or {}))


def mark_as_loaded(parameter: nn.Parameter) -> None:
    """Mark a parameter so that `initialize_weights` keeps its values; transformers reads the mark in `initialization`."""
    setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (mypy knows no such attribute)


AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModelForCausalLM.register(StudentConfig, Student)
