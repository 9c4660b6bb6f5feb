"""Rewrite a student as a class of flash-linear-attention that computes the same, where there is one.

fla's classes have Llama's block around their mixers. fla's kernels run on a GPU only.
"""

import importlib
import importlib.util
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.exports.native import (
    UNKNOWN,
    Tensors,
    block,
    build,
    check_layers,
    convolutions,
    projections,
    refusal,
    refuse,
    rename_prefixes,
)
from distill_pl.mixers import GatedDeltaNet
from distill_pl.mixers.short_conv import ConvolvedMixer
from distill_pl.student.modeling import Student, teacher_config

NORMS = {"input_layernorm.": "attn_norm.", "post_attention_layernorm.": "mlp_norm."}
DELTA = {"beta_proj.": "b_proj.", "norm.": "o_norm."}
GATED_DELTA = DELTA | {"gate_proj.": "g_proj.", "dt_bias": "dt_bias", "A_log": "A_log"}
# by mixer: the class's model_type, and beginnings of names of weights beside q, k, v and o, this package's -> fla's
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "gla": ("gla", {"gate_proj.": "g_proj.", "decay_proj.": "gk_proj.", "norm.": "g_norm_swish_gate."}),
    "retnet": ("retnet", {"gate_proj.": "g_proj.", "norm.": "g_norm_swish_gate."}),
    "delta_net": ("delta_net", DELTA),
    "gated_delta_net": ("gated_deltanet", GATED_DELTA | {"decay_proj.": "a_proj."}),
    "kda": ("kda", GATED_DELTA | {"decay_proj.": "f_proj."}),
}
REASONS = {
    "softmax": "fla's attention needs flash-attn, with which nothing was compared",
    "mlstm": "fla has no mLSTM",
    "hgrn2": "fla's HGRN2 has no bias in its forget gate",
    "mamba2": "fla's Mamba2 has no MLP",
    "metala": "fla has no MetaLA",
    "rebased": "fla has no model of ReBased",
    "hedgehog": "fla's Hedgehog shares its feature map between heads",
    "swa": "fla's attention has no sinks",
    "rwkv7": "fla's RWKV7 has an MLP with token shift",
}


@torch.no_grad()
def as_fla(student: Student) -> PreTrainedModel:
    """Convert a student to a model of a class of flash-linear-attention with the same logits.

    Raises InputError where that package is missing, and, with the reason, where no class computes what the student does.
    """
    config, teacher = student.config, teacher_config(student.config)
    if config.mixer not in TARGETS:
        raise refusal(student, REASONS.get(config.mixer, UNKNOWN))
    model_type, names = TARGETS[config.mixer]
    check_layers(student, "fla's class", rope=config.mixer == "retnet")
    refuse(student, {
        "fla's RetNet has RoPE of base 10,000 in every layer": config.mixer == "retnet" and (
            teacher.rope_parameters != {"rope_theta": 10000.0, "rope_type": "default"}
            or not all(mixer.teacher_rotates for mixer in student.mixers)
        )
    })  # fmt: skip
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("fla.models") is None:
        raise InputError("export --to fla needs flash-linear-attention: pip install -e '.[bench]'")
    importlib.import_module("fla.models")  # registers its classes
    mixer: Any = student.mixers[0]
    settings = {
        "model_type": model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": mixer.heads,
        "norm_eps": config.rms_norm_eps,
        "intermediate_size": teacher.intermediate_size,
    }
    if isinstance(mixer, GatedDeltaNet):
        settings |= {"head_dim": mixer.key_dim, "expand_v": mixer.value_dim / mixer.key_dim}
    else:
        shares = {"expand_k": mixer.key_dim, "expand_v": mixer.value_dim}
        settings |= {name: mixer.heads * width / config.hidden_size for name, width in shares.items()}

    def rows(layer: Any) -> Tensors:
        mixer = layer.self_attn
        tensors = {f"attn.{part}_proj.weight": projections(mixer, part) for part in "qkvo"}
        if isinstance(mixer, ConvolvedMixer):
            tensors |= {f"attn.{part}_conv1d.weight": convolutions(mixer, part) for part in "qkv"}
        own = {name: tensor for name, tensor in mixer.state_dict().items() if name.startswith(tuple(names))}
        attention = {f"attn.{name}": tensor for name, tensor in rename_prefixes(own, names).items()}
        return tensors | rename_prefixes(block(layer), NORMS) | attention

    return build(student, settings, rows, {"model.embed_tokens.": "model.embeddings."})
