"""The frozen teacher: one forward pass that yields, layer by layer, what the stages align to."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

from distill_pl.compiling.layers import compiled_on_gpu
from distill_pl.errors import InputError

TAP = "distill_pl_tap"


class Layer(NamedTuple):
    """What one decoder layer saw and did; B, T, H, K as everywhere, D hidden."""

    input: Tensor  # [B, T, D]
    output: Tensor  # [B, T, D]: of the block, before any final norm
    query: Tensor  # [B, T, H, K] after RoPE and q/k norms
    key: Tensor  # [B, T, kv_heads, K], likewise, not repeated
    scale: float
    position: tuple[Tensor, Tensor]  # RoPE's (cos, sin)


def _tap(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as transformers' sdpa does it, leaving q and k with the module where someone asked for them."""
    if getattr(module, "tapped", None) is not None:
        module.tapped = (query.transpose(1, 2), key.transpose(1, 2), scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@compiled_on_gpu
def _run(layer, hidden: Tensor, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
    """A decoder layer on hidden [B, T, D] -> its output, q, k and scale."""
    layer.self_attn.tapped = ()
    output = layer(hidden, attention_mask=None, position_embeddings=position)
    (query, key, scale), layer.self_attn.tapped = layer.self_attn.tapped, None
    return output, query, key, scale


@compiled_on_gpu
def _normalized(norm, hidden: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, D]."""
    return norm(hidden)


AttentionInterface.register(TAP, _tap)
AttentionMaskInterface.register(TAP, sdpa_mask)


class Teacher:
    """A frozen causal language model of transformers and its tokenizer.

    Not an nn.Module on purpose: a stage may hold it without DDP wrapping it or a checkpoint saving it.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.float32):
        """`path`: hub id or folder. Raises InputError where there is no model, no tokenizer, or no end-of-text token."""
        self.path = path
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
        except Exception as error:  # transformers raises whatever its tokenizer files made it trip over
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
        if missing := sorted(loading["missing_keys"]):  # transformers would make them up
            raise InputError(f"teacher {path!r} lacks {len(missing)} of its weights ({missing[0]}, ...): get the whole model")
        self.model: PreTrainedModel = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> "Teacher":
        """Move the weights."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @property
    def head(self) -> torch.nn.Linear:
        """Hidden states [.., D] -> logits [.., vocab]."""
        return self.model.lm_head

    @torch.no_grad()
    def layers(self, input_ids: Tensor) -> Iterator[Layer]:
        """One forward pass over input_ids [B, T], a layer at a time: what was yielded before may be dropped."""
        decoder = self.model.model
        if self.model.config._attn_implementation != TAP:
            self.model.set_attn_implementation(TAP)
        hidden = decoder.embed_tokens(input_ids)
        position = decoder.rotary_emb(hidden, torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        for layer in decoder.layers:
            output, query, key, scale = _run(layer, hidden, position)
            yield Layer(hidden, output, query, key, scale, position)
            hidden = output

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D] after the final norm: what the head reads."""
        for layer in self.layers(input_ids):
            hidden = layer.output
        return _normalized(self.model.model.norm, hidden)


def load_model(path: str, **options) -> Any:
    """A causal language model from a folder or the hub, running no code that lies there: neither modules nor pickles.

    transformers reads .bin files by `weights_only` even untold; its own words on one it refuses recommend to switch that off.
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
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
