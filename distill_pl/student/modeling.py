"""The student as a Hugging Face model: the teacher's architecture with a mixer in place of each layer's attention.

Norms, MLPs, rotary embedding and the layers' residual connections are the teacher's classes from transformers, so many decoders
can become students (`check_teacher` compares them), and weights keep the teacher's names. `import distill_pl` registers the
model with `AutoModelForCausalLM.from_pretrained(folder)`.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS, SequenceMixer
from distill_pl.mixers.mixer import Position, RMSNorm
from distill_pl.student.cache import CACHE, StudentCache
from distill_pl.teacher import embedding_scale, logits_scale, rope_tables, scaled

DECODER_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
JOINT = ".qkv_proj."  # in the names of projections of q, k and v in one (Phi 3)
GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE,
)  # fmt: skip
RETENTION = 0.982  # default of student.retention: sigmoid(4)


class StudentConfig(PreTrainedConfig):
    """The configuration of a student: the teacher's, the mixer that replaces its attention, and the mixer's sizes."""

    model_type = "distill_pl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    teacher: dict | None = None  # the teacher's config.json
    mixer: str = "gla"
    softmax_layers: list[int] = field(default_factory=list)  # layers that keep softmax attention
    shape: str = "copyable"
    rope: bool | None = None
    retention: float = RETENTION
    window: int | None = None  # last tokens that sliding-window attention reads
    sinks: int | None = None  # first tokens that it reads as well
    backend: str = "auto"
    # the sizes from which mixers are built: the teacher's, except that num_key_value_heads may be expanded to all heads
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    softmax_kv_heads: int = 0  # k and v heads of the layers in softmax_layers; 0: num_key_value_heads
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # whether q and k are normalised
    qk_norm_joint: bool = False  # over all heads together instead of each head
    qk_norm_offset: float = 0.0  # added to the weights of q and k norms
    attention_scale: float | None = None  # of q . k; default: head_dim ** -0.5
    # read by transformers' generation and by training code outside this package
    vocab_size: int = 0
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        """Drop `auto_map`, which names a module beside a folder's weights: what this class saves has none."""
        if type(self) is StudentConfig:
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)


class Student(PreTrainedModel, GenerationMixin):
    """A causal language model of the teacher's architecture with mixers as attention: tokens [B, T] -> logits [B, T, vocab].

    Private names of transformers are used only here, in `mark_as_loaded` and in `Teacher._set_taps`.
    """

    config: StudentConfig
    config_class = StudentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StudentConfig):
        """Build the model. Raises InputError for a configuration without a teacher's, or with a mixer that is not in MIXERS."""
        if not config.teacher:  # such as a Llama's
            raise InputError("a configuration without a teacher's is no student's: load a student's folder, or build one")
        if config.mixer not in MIXERS:
            raise InputError(f"mixer {config.mixer!r} is unknown: update distill_pl, which has {', '.join(MIXERS)}")
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # else transformers warns that it cannot derive the loss from the class's name
        decoder = AutoModel.from_config(teacher_config(config), trust_remote_code=False)
        softmax_config = copy.copy(config)
        softmax_config.shape, softmax_config.rope, softmax_config.window = "copyable", None, None
        softmax_config.num_key_value_heads = config.softmax_kv_heads or config.num_key_value_heads
        layer_types = getattr(decoder.config, "layer_types", None)
        for index, layer in enumerate(decoder.layers):
            keeps_softmax = index in config.softmax_layers
            mixer = MIXERS["softmax"](softmax_config, index) if keeps_softmax else MIXERS[config.mixer](config, index)
            mixer.teacher_rotates = bool(getattr(layer.self_attn, "use_rope", True))  # SmolLM3 has layers without RoPE
            mixer.layer_type = layer_types[index] if layer_types else ""
            layer.self_attn = mixer
            if not hasattr(layer, "input_layernorm"):  # OLMo 2 has only norms after attention
                layer.input_layernorm = nn.Identity()
        # the decoder's parts, not the decoder, whose forward pass builds attention masks and caches that mixers do not take
        self.model = nn.ModuleDict({part: getattr(decoder, part) for part in DECODER_PARTS})
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, decoder.embed_tokens.padding_idx)
        multiply_output(self.model.embed_tokens, embedding_scale(decoder))
        multiply_output(self.model.norm, logits_scale(decoder.config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # an instance of the teacher's class without modules; in a tuple, so that it is no submodule of this model
        self.initialiser = (without_modules(decoder),)
        self._no_split_modules = decoder._no_split_modules  # else device_map="auto" may split a layer over two GPUs
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module's weights at random; for modules of the teacher, by the teacher's class."""
        if isinstance(module, RMSNorm):
            initialization.constant_(module.weight, 1 - module.offset)
        elif type(module).__module__ == type(self.initialiser[0]).__module__:
            self.initialiser[0]._init_weights(module)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise linears and embeddings at random, then set each mixer's start values; keep loaded weights."""
        super().initialize_weights()
        for mixer in self.mixers:
            mixer.start(self.config)
            mixer.start_window()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights as nn.Module does, after splitting joint projections of q, k and v, as in a Phi 3 teacher."""
        tensors = dict(state_dict)
        split_joint_projections(tensors, self.config)
        return super().load_state_dict(tensors, *args, **kwargs)

    def train(self, mode: bool = True) -> "Student":
        """Set training mode, but keep dropout and noise of the teacher's modules off, as they are in the frozen teacher."""
        super().train(mode)
        for layer in self.model.layers:
            for name, module in layer.named_children():
                if name != "self_attn" and is_noisy(module):
                    module.eval()
        return self

    @property
    def mixers(self) -> list[SequenceMixer]:
        """Return the mixers, one for each layer."""
        return [layer.self_attn for layer in self.model.layers]

    def position(self, hidden: Tensor, position_ids: Tensor | None = None) -> Position:
        """Compute RoPE's cos and sin, each [B or 1, T, K], for hidden [B, T, D].

        position_ids: [B or 1, T], by default 0 to T - 1.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return rope_tables(self.model.rotary_emb, hidden, position_ids)

    def hidden_states(self, input_ids: Tensor | None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                      cache: StudentCache | None = None, inputs_embeds: Tensor | None = None,
                      record: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        """Compute the output of the final norm, which lm_head reads: input_ids [B, T] -> [B, T, D].

        attention_mask bool [B, T] is False where padded; inputs_embeds [B, T, D] replaces input_ids; cache is updated in place;
        the input of each layer [B, T, D] is appended to `record`.
        """
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position = self.position(hidden, position_ids)
        if torch.is_autocast_enabled(hidden.device.type):  # a residual stream in bf16 halves the memory traffic
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        for layer in self.model.layers:
            if record is not None:
                record.append(hidden)
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=position, **{CACHE: cache})
        return self.model.norm(hidden)

    def matrices(self, layer_inputs: list[Tensor], attention_mask: Tensor | None, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Build each layer's mixing matrix A [B, H, T, T] (Eq. 7) from its input [B, T, D]; attention_mask is bool [B, T]."""
        position = self.position(layer_inputs[0], position_ids)
        matrices = []
        for layer, hidden in zip(self.model.layers, layer_inputs, strict=True):
            matrices.append(layer.self_attn.matrix(layer.input_layernorm(hidden), position, attention_mask))
        return tuple(matrices)

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: StudentCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, output_hidden_states: bool | None = None,
                output_attentions: bool | None = None, cache: StudentCache | None = None,
                **kwargs: Any) -> CausalLMOutputWithPast:  # fmt: skip
        """Compute logits [B, T, vocab] and, if labels are given, the loss, by the interface of transformers' causal models.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S], where S counts the tokens in the cache and these T; 0 where padded (on the left when
                generating).
            position_ids: [B, T] or [1, T], for RoPE; by default they count the tokens that are not padded.
            past_key_values: the cache of an earlier call, which is read and updated; the same as `cache`.
            inputs_embeds: [B, T, D], in place of input_ids.
            labels: [B, T], not shifted; -100 is ignored.
            use_cache: whether to return a cache; by default `config.use_cache`, but not in training.
            logits_to_keep: the number of last positions to compute logits for (0: all), or an index of positions.
            output_hidden_states: whether to return the embeddings, the output of each layer but the last, and that of the
                final norm: tensors [B, T, D].
            output_attentions: whether to return each layer's mixing matrix, fp32 [B, H, T, T].
            cache: the name of past_key_values from transformers 5.24 on.
            kwargs: passed to `loss_function`, such as num_items_in_batch.

        Raises:
            InputError: inputs, mask or cache of another kind or shape; several sequences packed in a row; output_attentions
                with tokens in the cache; a cache with gradient checkpointing.
        """
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        check_shapes(input_ids, inputs_embeds, attention_mask, position_ids, cache, len(self.model.layers))
        check_one_sequence(attention_mask, position_ids, kwargs)
        seen = 0 if cache is None else cache.get_seq_length()
        if output_attentions and seen:
            raise InputError(f"output_attentions: the states of {seen} earlier tokens hold no matrix: give use_cache=False")
        if use_cache and cache is None:
            cache = StudentCache(len(self.model.layers))
        if cache is not None and self.training and self.model.layers[0].gradient_checkpointing:
            raise InputError(f"{CACHE}: gradient checkpointing would drop the states: call gradient_checkpointing_disable()")
        inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
        length = inputs.shape[1]
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:  # not on self.device, which is meta where accelerate keeps the weights on disk
                position_ids = torch.arange(seen, seen + length, device=inputs.device)[None]
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        record: list[Tensor] | None = [] if output_hidden_states or output_attentions else None
        hidden = self.hidden_states(input_ids, mask, position_ids, cache, inputs_embeds, record)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs),
            logits=logits,
            hidden_states=(*record, hidden) if record and output_hidden_states else None,
            attentions=self.matrices(record, mask, position_ids) if record and output_attentions else None,
            **{CACHE: cache if use_cache else None},
        )

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """Continue inputs [B, T] as transformers' `generate` does, with a StudentCache: greedily, by sampling or beam search.

        Raises InputError for another way of generating, a `cache_implementation`, or inputs without a token.
        """
        config = copy.deepcopy(self.generation_config)
        options = vars(generation_config) if generation_config is not None else {}
        for name, value in (options | kwargs).items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if config.is_assistant:  # set by a model for which this one is to draft tokens
            raise InputError("assistant_model: a student cannot be one, its state does not go back before a wrong token")
        if mode not in GENERATION_MODES:
            raise InputError(f"generate: a student does no {mode.value}: search greedily, by num_beams alone, or sample")
        if config.cache_implementation is not None:
            raise InputError(f"cache_implementation {config.cache_implementation!r}: a student has its own cache: leave it out")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds = kwargs.get("inputs_embeds") is not None
        if inputs is not None and inputs.shape[-1] == 0 and not embeds:
            raise InputError(f"input_ids {list(inputs.shape)} hold no token to continue: give at least one")
        if embeds and config.prefill_chunk_size is not None:
            raise InputError(f"prefill_chunk_size {config.prefill_chunk_size}: leave it out, inputs_embeds are read at once")
        # transformers reads embeddings once and needs a cache after that
        before, now = (kwargs.pop(name, None) for name in ("past_key_values", "cache"))
        cache = before if now is None else now
        if (config.use_cache is not False or embeds) and cache is None:
            cache = StudentCache(len(self.model.layers))
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(inputs, generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: continuous batching keeps keys and values in pages, which a recurrent state does not have."""
        raise InputError("continuous batching needs keys and values, which a student does not keep: generate batch by batch")

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return "eager", the only implementation of mixers. Raises ValueError, which transformers expects, for another."""
        if requested_attention not in (None, "eager"):
            raise ValueError(f"attn_implementation {requested_attention!r}: a student attends by its mixers: leave it out")
        return "eager"


def check_shapes(input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
                 position_ids: Tensor | None, cache: StudentCache | None, layers: int) -> None:  # fmt: skip
    """Raise InputError unless arguments of `Student.forward` have the types and shapes that its docstring gives."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("input_ids and inputs_embeds: give one of them")
    name, inputs = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    shape = list(inputs.shape)  # type: ignore[union-attr]
    if len(shape) != (2 if inputs_embeds is None else 3):
        raise InputError(f"{name} {shape}: give {'[B, T]' if inputs_embeds is None else '[B, T, D]'}")
    if shape[1] == 0:
        raise InputError(f"{name} {shape} hold no new token: with a cache, generate takes all tokens, or a mask of all tokens")
    if cache is not None and not (isinstance(cache, StudentCache) and len(cache.layers) == layers):
        raise InputError(f"{CACHE} {type(cache).__name__}: give a StudentCache that this model returned, or none")
    rows = shape[0] if cache is None else cache.rows() or shape[0]
    if rows != shape[0]:  # a state of one row would be added to all
        raise InputError(f"{CACHE} of {rows} rows for {shape[0]}: call its batch_repeat_interleave or batch_select_indices")
    seen = 0 if cache is None else cache.get_seq_length()
    expected = [shape[0], seen + shape[1]]
    if attention_mask is not None and list(attention_mask.shape) != expected:
        raise InputError(
            f"attention_mask {list(attention_mask.shape)}: give {expected}, 0 where padded, for {seen} tokens in the cache and "
            f"{shape[1]} new ones"
        )
    if position_ids is not None and list(position_ids.shape) not in ([shape[0], shape[1]], [1, shape[1]]):
        raise InputError(f"position_ids {list(position_ids.shape)}: give {shape[:2]}, those of the new tokens")


def check_one_sequence(attention_mask: Tensor | None, position_ids: Tensor | None, options: dict[str, Any]) -> None:
    """Raise InputError for a row of several sequences, by position_ids or FlashAttention's options, or with padding inside.

    A recurrent state would carry over from one sequence to the next, and decay over the padding. In compiled code, which cannot
    branch on values, only the options are checked.
    """
    if attention_mask is not None and not torch.compiler.is_compiling():
        mask = attention_mask.bool()
        if bool(((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any()):
            raise InputError("attention_mask has padding between tokens, over which a student's state decays: pad on the left")
    packed = any(options.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if position_ids is not None and position_ids.shape[1] > 1 and not packed and not torch.compiler.is_compiling():
        back = position_ids[:, 1:] < position_ids[:, :-1]
        if attention_mask is not None:  # padding on the right has position 0
            back = back & attention_mask[:, -back.shape[1] :].bool()
        packed = bool(back.any())
    if packed:
        raise InputError("position_ids start again within a row, over which a student's state goes on: give one sequence a row")


def teacher_config(config: StudentConfig) -> PreTrainedConfig:
    """Return the teacher's configuration, which the student's contains, with the student's vocabulary size."""
    return AutoConfig.for_model(**(config.teacher or {}) | {"vocab_size": config.vocab_size})


def multiply_output(module: nn.Module, factor: float) -> None:
    """Make a module multiply its output by a constant unless that is 1."""
    if factor != 1:
        module.register_forward_hook(partial(_times, factor))


def _times(factor: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return scaled(output, factor)


def is_noisy(module: nn.Module) -> bool:
    """Return whether a module is random in training: by dropout, or by noise in a router of experts."""
    attributes = [item for part in module.modules() for item in vars(part).items()]
    return any(value for key, value in attributes if key == "p" or "drop" in key or "jitter" in key)


def without_modules(decoder: PreTrainedModel) -> PreTrainedModel:
    """Return an instance of a decoder's class with its configuration but without modules."""
    empty = type(decoder).__new__(type(decoder))
    nn.Module.__init__(empty)
    empty.config = decoder.config
    return empty


def split_joint_projections(tensors: dict[str, Tensor], config: StudentConfig) -> None:
    """Replace, in place, joint projections of q, k and v (Phi 3), weights and biases, by three with Llama's names."""
    queries = config.num_attention_heads * config.head_dim
    for name in [name for name in tensors if JOINT in name]:
        joint = tensors.pop(name)
        keys = (len(joint) - queries) // 2
        for part, tensor in zip("qkv", joint.split([queries, keys, keys]), strict=True):
            tensors[name.replace(JOINT, f".{part}_proj.")] = tensor


def join_projections(tensors: dict[str, Tensor], names: Iterable[str]) -> None:
    """Join projections of q, k and v in place (Phi 3), for those of `names` that name a joint projection."""
    for name in [name for name in names if JOINT in name]:
        tensors[name] = torch.cat([tensors.pop(name.replace(JOINT, f".{part}_proj.")) for part in "qkv"])


def mark_as_loaded(parameter: nn.Parameter) -> None:
    """Mark a parameter so that `initialize_weights` keeps its values; transformers reads the mark in `initialization`."""
    setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (mypy knows no such attribute)


AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModelForCausalLM.register(StudentConfig, Student)
