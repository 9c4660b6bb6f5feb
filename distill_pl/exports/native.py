"""Rewrite a student as a class of transformers that computes the same, where there is one.

Only weights are rewritten: k and v heads that several query heads share are repeated, projections are put side by side in the
order of the class. A student with a part that a class has no place for is refused by name.

transformers' cache of these classes counts tokens by their attention layers, and fails where there are none. A student without
attention therefore gets one more layer of zeros, whose attention and MLP add nothing: its logits stay the same to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.mixers import Mamba2, Softmax
from distill_pl.student.modeling import Student, teacher_config
from distill_pl.student.transfer import as_transformer, expand_kv

# tensors of a layer outside attention that the classes below have: Llama's
LLAMA_BLOCK = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
    f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
}
SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # Granite's, 1 for other teachers
Tensors = dict[str, Tensor]


def as_native(student: Student) -> PreTrainedModel:
    """Convert a student to a model of a class of transformers with the same logits.

    Raises InputError, with the reason, where no class computes what the student does.
    """
    if all(isinstance(mixer, Softmax) for mixer in student.mixers):
        model = as_transformer(student)
        refuse(student, {"its attention has no RoPE, unlike its teacher's": model is student})
        return model
    target = TARGETS[student.config.mixer]
    if isinstance(target, str):
        raise refusal(student, target)
    return target(student)


def refusal(student: Student, why: str) -> InputError:
    """Return the error that says why a student has no exact counterpart."""
    kind = f"{student.config.mixer} student of a {teacher_config(student.config).model_type}"
    return InputError(f"export: a {kind} has no exact counterpart in transformers, {why}: choose --to remote")


def refuse(student: Student, reasons: dict[str, bool]) -> None:
    """Raise InputError for the first of `reasons` that holds."""
    for why, holds in reasons.items():
        if holds:
            raise refusal(student, why)


def check_layers(student: Student, target: str, scales: bool = False, attention: bool = False) -> None:
    """Raise InputError for what a class with Llama's MLP and norms, and a mixer without extras, has no place for.

    scales, attention: whether the class has Granite's SCALES, and a place for the teacher's softmax attention.
    """
    config, teacher = student.config, teacher_config(student.config)
    mixers = [mixer for mixer in student.mixers if not isinstance(mixer, Softmax)]
    parts = [{name for name in layer.state_dict() if not name.startswith("self_attn.")} for layer in student.model.layers]
    other = sorted(set().union(*(names ^ LLAMA_BLOCK for names in parts)))
    activation = getattr(teacher, "hidden_activation", None) or teacher.hidden_act
    refuse(student, {
        f"{target} has no window attention beside a mixer (student.window)": config.window is not None,
        f"{target} does not rotate q and k (student.rope)": any(mixer.rope for mixer in mixers),
        f"{target} has no norms of q and k before the convolution": config.qk_norm,
        f"{target} has no biases of q, k, v and o, or has them in padded tokens too": config.qkv_bias or config.o_bias,
        f"{target} normalises q and k of its attention, or compresses them (student.softmax_layers)": (
            len(mixers) < len(student.mixers) and not attention
        ),
        f"the teacher's layers differ from {target}'s in {', '.join(other[:2])}": bool(other),
        f"{target} has silu in its MLP, not {activation}": activation not in ("silu", "swish"),
        f"{target} scales neither embeddings nor residuals nor logits": (
            not scales and any(getattr(teacher, name, 1) != 1 for name in SCALES)
        ),
    })  # fmt: skip


def shared_settings(student: Student) -> dict[str, Any]:
    """Return what classes of transformers call by the same name as a StudentConfig."""
    names = (
        "vocab_size", "hidden_size", "rms_norm_eps", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {name: getattr(student.config, name) for name in names}


def layer_types(student: Student) -> list[str]:
    """Name the kind of each layer as transformers does, with an idle layer of attention at the end if there is no other."""
    types = ["full_attention" if isinstance(mixer, Softmax) else "linear_attention" for mixer in student.mixers]
    return types if "full_attention" in types else [*types, "full_attention"]


def build(settings: dict[str, Any], tensors: Tensors, layers: int) -> PreTrainedModel:
    """Make a model of a configuration and `tensors` by name; those of layer number `layers`, the idle one, are zeros."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, tensor in model.state_dict().items():
        if name.startswith(f"model.layers.{layers}."):
            tensors[name] = torch.zeros_like(tensor)
    model.load_state_dict(tensors)
    return model


def outside_layers(student: Student) -> Tensors:
    """Return embeddings, final norm and head."""
    return {name: tensor for name, tensor in student.state_dict().items() if not name.startswith("model.layers.")}


def convolutions(mixer: Any, order: str) -> Tensor:
    """Put the taps of a mixer's short convolutions side by side -> [channels, 1, taps], kv heads repeated."""
    taps = {part: getattr(mixer, f"{part}_conv").weight for part in order}
    taps |= {part: expand_kv(taps[part], mixer.heads, mixer.kv_count) for part in "kv"}
    return torch.cat([taps[part] for part in order])[:, None]


def projections(mixer: Any, order: str) -> Tensor:
    """Put a mixer's projections side by side -> [channels, D], kv heads repeated."""
    rows = {part: getattr(mixer, f"{part}_proj").weight for part in order}
    rows |= {part: expand_kv(rows[part], mixer.heads, mixer.kv_count) for part in "kv"}
    return torch.cat([rows[part] for part in order])


@torch.no_grad()
def granite(student: Student) -> PreTrainedModel:
    """Convert Mamba2, beside the teacher's attention or alone, to Granite 4's class: GraniteMoeHybrid without experts.

    Each head is a group of its own, with its own B and C, and the gated norm of a group is the norm of a head.
    """
    config, teacher = student.config, teacher_config(student.config)
    check_layers(student, "GraniteMoeHybrid", scales=True, attention=True)
    mixer: Any = next(mixer for mixer in student.mixers if isinstance(mixer, Mamba2))
    attention: Any = [mixer for mixer in student.mixers if isinstance(mixer, Softmax)]
    width = mixer.heads * mixer.value_dim
    rotated = {mixer.teacher_rotates for mixer in attention}
    refuse(student, {
        f"GraniteMoeHybrid's mixers are a whole number of times as wide as its hidden state, not {width} and "
        f"{config.hidden_size}": width % config.hidden_size > 0,
        "GraniteMoeHybrid has RoPE in all of its attention layers or in none": len(rotated) > 1,
    })  # fmt: skip
    types = layer_types(student)
    settings = shared_settings(student) | {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(types),
        "layer_types": types,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": teacher.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads if attention else 1,
        "attention_multiplier": attention[0].scale if attention else 1.0,
        "position_embedding_type": "rope" if rotated == {True} else None,
        "rope_parameters": teacher.rope_parameters,
        "mamba_n_heads": mixer.heads,
        "mamba_n_groups": mixer.heads,
        "mamba_d_state": mixer.key_dim,
        "mamba_d_head": mixer.value_dim,
        "mamba_expand": width // config.hidden_size,
        "mamba_conv_bias": False,
    }
    settings |= {name: getattr(teacher, name, 1.0) for name in SCALES}
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        settings["head_dim"] = config.head_dim  # which the class does not declare, and reads
    tensors = outside_layers(student)
    for index, layer in enumerate(student.model.layers):
        mixer, given = layer.self_attn, layer.state_dict()
        rows = {name: tensor for name, tensor in given.items() if "layernorm" in name}
        rows["shared_mlp.input_linear.weight"] = torch.cat([given["mlp.gate_proj.weight"], given["mlp.up_proj.weight"]])
        rows["shared_mlp.output_linear.weight"] = given["mlp.down_proj.weight"]
        if isinstance(mixer, Softmax):
            rows |= {name: tensor for name, tensor in given.items() if name.startswith("self_attn.")}
        else:
            rows |= {
                "mamba.in_proj.weight": torch.cat([mixer.gate_proj.weight, projections(mixer, "vkq"), mixer.dt_proj.weight]),
                "mamba.conv1d.weight": convolutions(mixer, "vkq"),
                "mamba.dt_bias": mixer.dt_proj.bias,
                "mamba.A_log": mixer.A_log,
                "mamba.D": mixer.D,
                "mamba.norm.weight": mixer.norm.weight.repeat(mixer.heads),
                "mamba.out_proj.weight": mixer.o_proj.weight,
            }
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in rows.items()}
    return build(settings, tensors, len(student.mixers))


TARGETS: dict[str, Callable[[Student], PreTrainedModel] | str] = {  # by mixer: the rewriting, or why there is none
    "mamba2": granite,
}
