"""Run the frozen teacher once and yield, layer by layer, what the stages align to."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
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

from distill_pl.errors import InputError

TAP = "distill_pl_tap"


class Layer(NamedTuple):
    """Hold what one decoder layer of the teacher read and computed. B batch, T time, H heads, K head dim, D hidden."""

    input: Tensor  # [B, T, D]
    output: Tensor  # [B, T, D]: the block's, before any final norm
    query: Tensor  # [B, T, H, K] after RoPE and q/k norms
    key: Tensor  # [B, T, kv_heads, K] after RoPE and q/k norms, kv heads not repeated
    scale: float
    position: tuple[Tensor, Tensor]  # RoPE's (cos, sin)


def _tap(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attend as transformers' sdpa does, and leave q, k and the scale in `module.tapped` where that is not None."""
    if getattr(module, "tapped", None) is not None:
        module.tapped = (query.transpose(1, 2), key.transpose(1, 2), scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def run_layer(layer, hidden: Tensor, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Run a decoder layer on hidden [B, T, D] -> its output, query, key and scale, shaped as in `Layer`."""
    layer.self_attn.tapped = ()
    output = layer(hidden, attention_mask=None, position_embeddings=position)
    (query, key, scale), layer.self_attn.tapped = layer.self_attn.tapped, None
    return output, query, key, scale


def apply_norm(norm, hidden: Tensor) -> Tensor:
    """Apply the final norm to hidden [B, T, D]."""
    return norm(hidden)


AttentionInterface.register(TAP, _tap)
AttentionMaskInterface.register(TAP, sdpa_mask)


class Teacher:
    """Hold a frozen causal language model of transformers and its tokenizer.

    Not an nn.Module on purpose: a stage may hold a Teacher without DDP wrapping it or a checkpoint saving it.
    """

    compiles: ClassVar[tuple[str, ...]] = ("run_layer", "apply_norm")  # functions that distill_pl.compiling may compile

    def __init__(self, path: str, dtype: torch.dtype = torch.float32):
        """Load model and tokenizer from `path`, a hub id or folder, in `dtype`, without running code that lies there.

        Raises InputError where there is no model, a weight is missing, or the tokenizer is unusable or has no eos token.
        """
        self.path, self.run_layer, self.apply_norm = path, run_layer, apply_norm
        if (Path(path).is_dir() or path[:1] in "./~") and not (Path(path) / "config.json").is_file():
            raise InputError(f"teacher {path!r} is no folder with a config.json: give a Hugging Face model folder or a hub id")
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"teacher {path!r} is no model folder and could not be had from the hub: give a folder with config.json, "
                f"or check the id and the network ({_first_line(error)})"
            ) from error
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers has no common error for damaged tokenizer files
            raise InputError(
                f"teacher {path!r} has no usable tokenizer: put tokenizer.json beside its weights ({_first_line(error)})"
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
                loaded: Any = load_model(path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"teacher {path!r} is not a supported decoder, or its weights are missing ({_first_line(error)}): "
                "give a Llama-like causal language model"
            ) from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
            raise InputError(f"teacher {path!r} lacks {len(missing)} of its weights ({missing[0]}, ...): get the whole model")
        self.model: PreTrainedModel = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> "Teacher":
        """Move the weights to `device` and return the teacher."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @property
    def head(self) -> torch.nn.Linear:
        """Return the head, which maps final hidden states [..., D] to logits [..., vocab]."""
        return self.model.lm_head

    @torch.no_grad()
    def layers(self, input_ids: Tensor) -> Iterator[Layer]:
        """Run input_ids [B, T] through the decoder, yielding each layer's tensors as soon as that layer is done.

        No layer's tensors are kept here: a caller who drops them bounds the memory by one layer.
        """
        decoder = self.model.model
        if self.model.config._attn_implementation != TAP:
            self.model.set_attn_implementation(TAP)
        hidden = decoder.embed_tokens(input_ids)
        position = decoder.rotary_emb(hidden, torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        for layer in decoder.layers:
            output, query, key, scale = self.run_layer(layer, hidden, position)
            yield Layer(hidden, output, query, key, scale, position)
            hidden = output

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Run input_ids [B, T] -> the final hidden states [B, T, D], after the final norm."""
        for layer in self.layers(input_ids):
            hidden = layer.output
        return self.apply_norm(self.model.model.norm, hidden)


def load_model(path: str, **options) -> Any:
    """Load a causal language model from a folder or the hub without running code that lies there, modules or pickles.

    `options` go to `from_pretrained`. Raises InputError for damaged weights and for pickles that are not plain tensors;
    transformers' own message would recommend to load such a pickle unsafely.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, weights_only=True, **options)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        files = sorted(str(file) for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin"))
        raise InputError(
            f"{', '.join(files) or path}: weights that are damaged, of other shapes, or no plain tensors but code, which was "
            f"not run ({type(error).__name__}): get them again from a source you trust, best as safetensors"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened, or the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
