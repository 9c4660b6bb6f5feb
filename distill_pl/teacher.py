"""The frozen teacher, which yields layer by layer what the stages align to: queries, keys, hidden states."""

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill_pl.errors import InputError, first_line, one_line

TAP = "distill_pl_tap"
CAUSAL_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")  # which GPT-2 and its like keep among their weights


class Layer(NamedTuple):
    """Hold the input and results of one decoder layer of the teacher. B batch, T time, H heads, K head dim, D hidden."""

    input: Tensor  # [B, T, D]
    output: Tensor  # [B, T, D]: of the whole block, before any final norm
    query: Tensor  # [B, T, H, K] after RoPE and q/k norms
    key: Tensor  # [B, T, kv_heads, K] after RoPE and q/k norms, kv heads not repeated
    scale: float
    position: tuple[Tensor, Tensor]  # RoPE's (cos, sin) of this layer, each [B or 1, T, K]
    mixed: Tensor | None = None  # [B, T, D]: attention's output, after o_proj; None unless requested


def _tap(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attend as transformers' sdpa does, and store q, k and the scale in `module.tapped` unless that is None."""
    if getattr(module, "tapped", None) is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        module.tapped = (query.transpose(1, 2), key.transpose(1, 2), scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _tap_output(module, arguments, output) -> None:
    """Append the output of an attention module to `module.tapped` unless that is None."""
    if getattr(module, "tapped", None) is not None:
        module.tapped = (*module.tapped, output[0])


def run_layer(layer, hidden: Tensor, position: tuple[Tensor, Tensor],
              with_mixed: bool = False) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:  # fmt: skip
    """Run a decoder layer on hidden [B, T, D] -> output, query, key, scale and, if `with_mixed`, mixed, as in `Layer`."""
    layer.self_attn.tapped = ()
    output = layer(hidden, attention_mask=None, position_embeddings=position)
    (query, key, scale, mixed), layer.self_attn.tapped = layer.self_attn.tapped, None
    return output, query, key, scale, mixed if with_mixed else None


def apply_norm(norm, hidden: Tensor) -> Tensor:
    """Apply the final norm to hidden [B, T, D] -> [B, T, D]."""
    return norm(hidden)


AttentionInterface.register(TAP, _tap)
AttentionMaskInterface.register(TAP, sdpa_mask)


class Teacher:
    """Hold a frozen causal language model of transformers and its tokenizer.

    It is no nn.Module, so that a stage can hold a Teacher without DDP wrapping it or a checkpoint saving it.
    """

    compiles: ClassVar[tuple[str, ...]] = ("apply_norm",)  # names of functions that distill_pl.compiling may compile
    compiles_with_layer: ClassVar[tuple[str, ...]] = ("run_layer",)  # names of further functions, which call one layer

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        """Load model and tokenizer from `path`, a hub id or folder, in `dtype`, without running code that comes with them.

        Raises InputError if there is no model, it is quantised, a weight is missing, or the tokenizer is unusable, has no EOS
        token or has ids for which the model has no embeddings.
        """
        path = str(path)
        self.path, self.run_layer, self.apply_norm = path, run_layer, apply_norm
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"teacher: dtype {dtype!r} is no torch.dtype: give torch.float32 or torch.bfloat16")
        if (Path(path).is_dir() or path[:1] in "./~") and not (Path(path) / "config.json").is_file():
            raise InputError(f"teacher {path!r} is no folder with a config.json: give a Hugging Face model folder or a hub id")
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # wrong values in a config.json raise errors of any kind
            if Path(path).is_dir():
                raise InputError(f"teacher {path!r}: its config.json cannot be used ({one_line(error)}): mend it") from error
            raise InputError(
                f"teacher {path!r} is no model folder and could not be had from the hub: give a folder with config.json, "
                f"or check the id and the network ({first_line(error)})"
            ) from error
        if self.config.model_type == "distill_pl":
            raise InputError(f"teacher {path!r} is a student of this package: give the teacher that it was distilled from")
        if quantisation := getattr(self.config, "quantization_config", None):
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise InputError(
                f"teacher {path!r} is quantised ({method or 'quantization_config in config.json'}), but a student copies whole "
                "weights: give the model that it was quantised from"
            )
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers has no common error for damaged tokenizer files
            raise InputError(
                f"teacher {path!r} has no usable tokenizer: put tokenizer.json beside its weights ({first_line(error)})"
            ) from error
        if not getattr(self.tokenizer, "is_fast", False) or len(self.tokenizer) == 0:
            raise InputError(f"teacher {path!r} has no usable tokenizer: put tokenizer.json beside its weights")
        templates = self.tokenizer.chat_template
        if odd := [name for name in (templates if isinstance(templates, dict) else ()) if name != Path(name).name]:
            raise InputError(f"teacher {path!r}: its chat template {odd[0]!r} would be a file elsewhere: rename or delete it")
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"teacher {path!r}: its tokenizer has no eos_token, which separates documents; set one")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = load_model(path, f"teacher {path!r}", "get the whole model", all_weights=True, dtype=dtype,
                                   attn_implementation="sdpa")  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # architectures raise errors of any kind, also for missing libraries
            reason = f", or its weights are missing ({first_line(error)})"
            if "scaled_dot_product_attention" in str(error):
                reason = f": the attention of {', '.join(self.config.architectures or [])} is not plain softmax attention"
            raise InputError(
                f"teacher {path!r} is not a supported decoder{reason}; give a Llama-like causal language model"
            ) from error
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        largest, rows = max(self.tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
        if largest >= rows:
            raise InputError(
                f"teacher {path!r}: its tokenizer has ids up to {largest}, but its embedding has {rows} rows: "
                "give the tokenizer that it was trained with"
            )

    def to(self, device: torch.device) -> "Teacher":
        """Move the weights to `device` and return the teacher."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @property
    def longest(self) -> int:
        """Return the number of tokens that the teacher has positions for and that all see each other.

        Within a sliding window, attention is plain causal attention; Qwen2-MoE writes a window of 0 for none.
        """
        positions = self.config.max_position_embeddings
        return min(positions, getattr(self.config, "sliding_window", None) or positions)

    @property
    def head(self) -> torch.nn.Linear:
        """Return the head, which maps final hidden states [..., D] to logits [..., vocab]."""
        return self.model.lm_head

    def _set_taps(self) -> None:
        """Make each attention module store q, k, scale and output in its attribute `tapped` unless that is None."""
        if self.model.config._attn_implementation != TAP:
            self.model.set_attn_implementation(TAP)
        for layer in self.model.model.layers:
            if not hasattr(layer.self_attn, "tapped"):
                layer.self_attn.tapped = None
                layer.self_attn.register_forward_hook(_tap_output)

    @torch.no_grad()
    def layers(self, input_ids: Tensor, with_mixed: bool = False) -> Iterator[Layer]:
        """Run input_ids [B, T] through the decoder, yielding each layer's tensors as soon as they are computed.

        No tensors are kept here: a caller that drops them needs memory for one layer only.
        """
        decoder = self.model.model
        self._set_taps()
        hidden = scaled(decoder.embed_tokens(input_ids), getattr(decoder, "embedding_multiplier", 1.0))
        positions = rope_tables(decoder.rotary_emb, hidden, torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        for index, layer in enumerate(decoder.layers):
            position = positions[decoder.config.layer_types[index]] if isinstance(positions, dict) else positions
            output, query, key, scale, mixed = self.run_layer(layer, hidden, position, with_mixed)
            yield Layer(hidden, output, query, key, scale, position, mixed)
            hidden = output

    @torch.no_grad()
    def own_layers(self, input_ids: Tensor) -> list[Layer]:
        """Run the model's own forward pass on input_ids [B, T] and return all layers, to compare with those of `layers`."""
        self._set_taps()
        found: list[Layer] = []

        def record(layer, args, kwargs, output):
            query, key, scale, mixed = layer.self_attn.tapped
            layer.self_attn.tapped = None
            found.append(Layer(args[0], output, query, key, scale, kwargs["position_embeddings"], mixed))

        hooks = []
        for layer in self.model.model.layers:
            layer.self_attn.tapped = ()
            hooks.append(layer.register_forward_hook(record, with_kwargs=True))
        self.model(input_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Compute the input of the head [B, T, D] from input_ids [B, T]: final hidden states, after norm and `logits_scale`."""
        for layer in self.layers(input_ids):
            hidden = layer.output
        return scaled(self.apply_norm(self.model.model.norm, hidden), logits_scale(self.model.config))


def load_model(path: str, name: str, remedy: str, all_weights: bool = False, **options) -> Any:
    """Load a causal language model from a folder or the hub without running code that comes with it, in modules or pickles.

    `options` go to `from_pretrained`. Raises InputError for damaged weights and for pickles that are not plain tensors, for
    which transformers' own message would recommend unsafe loading; for missing weights, with the model's name and a remedy; and
    where `all_weights` are to be used, for some that the model of config.json does not have, such as those of further layers.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, weights_only=True, output_loading_info=True, **options
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        files = sorted(str(file) for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin"))
        raise InputError(
            f"{', '.join(files) or path}: weights that are damaged, of other shapes, or no plain tensors but code, which was "
            f"not run ({type(error).__name__}): get them again from a source you trust, best as safetensors"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise InputError(f"{name} lacks {len(missing)} of its weights ({missing[0]}, ...): {remedy}")
    extra = [key for key in sorted(loading["unexpected_keys"]) if not CAUSAL_MASK.search(key)]
    if all_weights and extra:  # transformers would leave them out
        raise InputError(
            f"{name} has {len(extra)} weights that are none of the model of its config.json ({extra[0]}, ...): mend config.json"
        )
    return model


def scaled(x: Tensor, factor: float) -> Tensor:
    """Multiply x by a constant; return x itself if that is 1."""
    return x if factor == 1 else x * factor


def embedding_scale(decoder: Any) -> float:
    """Return the factor by which embeddings are multiplied, in the embedding module (Gemma) or in the decoder (Granite)."""
    return getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0) * getattr(decoder, "embedding_multiplier", 1.0)


def logits_scale(config: Any) -> float:
    """Return the factor by which a causal language model's logits are multiplied (Granite)."""
    return 1 / getattr(config, "logits_scaling", 1.0)


def rope_tables(rotary_emb: Any, hidden: Tensor, position_ids: Tensor) -> Any:
    """Compute RoPE's (cos, sin), [B, T, K] each, for hidden [B, T, D] at position_ids [B, T].

    For teachers with several kinds of RoPE (Gemma 3), return a dict with one pair for each type of layer.
    """
    types = getattr(rotary_emb, "layer_types", None)
    return {x: rotary_emb(hidden, position_ids, x) for x in types} if types else rotary_emb(hidden, position_ids)


def ties_embeddings(model: PreTrainedModel) -> bool:
    """Return whether a model's head is its embedding; the weights decide, since its configuration can be wrong."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def shallow_copy(teacher: Teacher) -> Teacher:
    """Copy a teacher's first layers to the CPU in fp32, without tokenizer; add random numbers to norm weights and biases.

    The copy has at least two layers, and one of each kind. Layers are of one kind if they differ only in their weights.
    """
    decoder, lists = teacher.model.model, _lists_by_layer(teacher.config)
    kinds = [(_description(layer), *values) for layer, *values in zip(decoder.layers, *lists.values(), strict=True)]
    count = max(2, 1 + max(kinds.index(kind) for kind in kinds))
    layers, decoder.layers = decoder.layers, decoder.layers[:count]
    try:
        model: Any = copy.deepcopy(teacher.model)
    finally:
        decoder.layers = layers
    model.config.num_hidden_layers = len(model.model.layers)
    for name, values in lists.items():
        setattr(model.config, name, values[:count])
    generator = torch.Generator().manual_seed(0)
    for tensor in model.to("cpu", torch.float32).state_dict().values():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # restore the scale, which a teacher in bf16 has rounded
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    shallow = Teacher.__new__(Teacher)
    shallow.path, shallow.config, shallow.model = teacher.path, model.config, model
    shallow.run_layer, shallow.apply_norm = run_layer, apply_norm
    return shallow


def _lists_by_layer(config: Any) -> dict[str, list]:
    """Return the lists in a configuration that have one value for each layer."""
    count = config.num_hidden_layers
    return {name: values for name, values in vars(config).items() if isinstance(values, list) and len(values) == count}


def _description(layer: torch.nn.Module) -> list:
    """Describe a layer by its modules' names, types and settings, without weights and layer number."""
    plain = (bool, int, float, str, NoneType)
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"})
        for name, module in layer.named_modules()
    ]
