"""Rewrite a student as a class of transformers that computes the same, where there is one.

Only weights are rewritten: k and v heads that several query heads share are repeated, projections are put side by side in the
order of the class. A student with a part that a class has no place for is refused by name.

transformers' cache of these classes counts tokens by their attention layers, and fails where there are none. A student without
attention therefore gets one more layer of zeros, whose attention and MLP add nothing: its logits stay the same to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.mixers import KDA, Mamba2, Softmax
from distill_pl.student.modeling import Student, teacher_config
from distill_pl.student.transfer import as_transformer, expand_kv

# tensors of a layer outside attention that the classes below have: Llama's
LLAMA_BLOCK = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
    f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
}
SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # Granite's, 1 for other teachers
SHARED = (  # keys of StudentConfig that configurations of transformers call by the same name
    "vocab_size", "hidden_size", "rms_norm_eps", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
GRANITE = "5.23"  # the first version of transformers whose gated norm is one for each group of Mamba2
LAYERS = "model.layers."
SOFT_CAP = 2.0**20  # a soft cap, SOFT_CAP * tanh(x / SOFT_CAP), that is x to fp32 for |x| < 300; division by it is exact
Tensors = dict[str, Tensor]


def as_native(student: Student) -> PreTrainedModel:
    """Convert a student to a model of a class of transformers with the same logits.

    Raises InputError, with the reason, where no class computes what the student does.
    """
    if all(isinstance(mixer, Softmax) for mixer in student.mixers):
        model = as_transformer(student)
        refuse(student, {"its attention has no RoPE, unlike its teacher's": model is student})
        return model
    target = TARGETS.get(student.config.mixer, UNKNOWN)
    if isinstance(target, str):
        raise refusal(student, target)
    return target(student)


def refusal(student: Student, why: str) -> InputError:
    """Return the error that says why a student has no exact counterpart."""
    kind = f"{student.config.mixer} student of a {teacher_config(student.config).model_type}"
    return InputError(f"export: no exact counterpart of this {kind}: {why}: choose another --to, such as remote")


def refuse(student: Student, reasons: dict[str, bool]) -> None:
    """Raise InputError for the first of `reasons` that holds."""
    for why, holds in reasons.items():
        if holds:
            raise refusal(student, why)


def check_layers(student: Student, target: str, scales: bool = False, attention: bool = False, rope: bool = False) -> None:
    """Raise InputError for what a class with Llama's MLP and norms, and a mixer without extras, has no place for.

    scales, attention, rope: whether the class has Granite's SCALES, has the teacher's softmax attention too, and rotates q and
    k of its mixers.
    """
    config, teacher = student.config, teacher_config(student.config)
    mixers = [mixer for mixer in student.mixers if not isinstance(mixer, Softmax)]
    other = sorted(set().union(*(block(layer).keys() ^ LLAMA_BLOCK for layer in student.model.layers)))
    activation = getattr(teacher, "hidden_activation", None) or teacher.hidden_act
    refuse(student, {
        f"{target} has no window attention beside a mixer (student.window)": config.window is not None,
        f"{target} {'rotates' if rope else 'does not rotate'} q and k (student.rope)": any(x.rope != rope for x in mixers),
        f"{target} has no norms of q and k before its mixers": config.qk_norm,
        f"{target} has no biases of q, k, v and o, or has them in padded tokens too": config.qkv_bias or config.o_bias,
        f"{target} has no attention like the teacher's (student.softmax_layers)": not attention and mixers != student.mixers,
        f"{target} divides q . k by the root of their width": config.attention_scale is not None and not attention,
        f"the teacher's layers differ from {target}'s in {', '.join(other[:2])}": bool(other),
        f"{target} has silu in its MLP, not {activation}": activation not in ("silu", "swish"),
        f"{target} scales neither embeddings nor residuals nor logits": (
            not scales and any(getattr(teacher, name, 1) != 1 for name in SCALES)
        ),
    })  # fmt: skip


def layer_types(student: Student) -> list[str]:
    """Name the kind of each layer as transformers does, with an idle layer of attention at the end if there is no other."""
    types = ["full_attention" if isinstance(mixer, Softmax) else "linear_attention" for mixer in student.mixers]
    return types if "full_attention" in types else [*types, "full_attention"]


def build(student: Student, settings: dict[str, Any], rows: Callable[[Any], Tensors],
          renamed: dict[str, str] | None = None) -> PreTrainedModel:  # fmt: skip
    """Make a model from a configuration and, by `rows`, what a layer of the student becomes, by names within the layer.

    renamed: beginnings of names, a student's -> the class's. A tensor of the model that nothing is given for, as in an idle
    layer, is zero.
    """
    settings |= {name: getattr(student.config, name) for name in SHARED if name not in settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    tensors = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(LAYERS)}
    for index, layer in enumerate(student.model.layers):
        tensors |= {f"{LAYERS}{index}.{name}": tensor for name, tensor in rows(layer).items()}
    tensors = rename_prefixes(tensors, renamed or {})
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if name not in tensors}
    model.load_state_dict(tensors | zeros)
    return model


def rename_prefixes(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Rename tensors whose name begins with a key of `names` so that it begins with the value."""
    for before, after in names.items():
        tensors = {after + name.removeprefix(before) if name.startswith(before) else name: x for name, x in tensors.items()}
    return tensors


def block(layer: Any) -> Tensors:
    """Return a layer's tensors outside its mixer."""
    return {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("self_attn.")}


def projections(mixer: Any, order: str) -> Tensor:
    """Put a mixer's projections side by side -> [channels, D], kv heads repeated."""
    return side_by_side({part: getattr(mixer, f"{part}_proj").weight for part in order}, mixer)


def convolutions(mixer: Any, order: str) -> Tensor:
    """Put the taps of a mixer's short convolutions side by side -> [channels, 1, taps], kv heads repeated."""
    return side_by_side({part: getattr(mixer, f"{part}_conv").weight for part in order}, mixer)[:, None]


def side_by_side(rows: Tensors, mixer: Any) -> Tensor:
    """Concatenate rows of q, k and v, [heads X, ...] each, those of k and v repeated for every head."""
    return torch.cat([expand_kv(x, mixer.heads, mixer.kv_count) if part in "kv" else x for part, x in rows.items()])


@torch.no_grad()
def granite(student: Student) -> PreTrainedModel:
    """Convert Mamba2, beside the teacher's attention or alone, to Granite 4's class: GraniteMoeHybrid without experts.

    Each head is a group of its own, with its own B and C, and the gated norm of a group is the norm of a head.
    """
    config, teacher = student.config, teacher_config(student.config)
    check_layers(student, "GraniteMoeHybrid", scales=True, attention=True)
    mixer: Any = next(mixer for mixer in student.mixers if isinstance(mixer, Mamba2))
    attention: Any = [mixer for mixer in student.mixers if isinstance(mixer, Softmax)]
    width, rotated = mixer.heads * mixer.value_dim, {mixer.teacher_rotates for mixer in attention}
    refuse(student, {
        f"GraniteMoeHybrid's mixers are a whole number of times as wide as its hidden state, not {width} and "
        f"{config.hidden_size}": width % config.hidden_size > 0,
        "GraniteMoeHybrid has RoPE in all of its attention layers or in none": len(rotated) > 1,
        f"GraniteMoeHybrid of transformers {transformers.__version__} normalises all heads together, {GRANITE} each": (
            Version(transformers.__version__) < Version(GRANITE)
        ),
    })  # fmt: skip
    types = layer_types(student)
    settings = {name: getattr(teacher, name, 1.0) for name in SCALES} | {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(types),
        "layer_types": types,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "intermediate_size": teacher.intermediate_size,  # of experts, of which there are none
        "shared_intermediate_size": teacher.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": attention[0].kv_count if attention else 1,
        "attention_multiplier": attention[0].scale if attention else 1.0,
        "position_embedding_type": "rope" if rotated == {True} else None,
        "rope_parameters": teacher.rope_parameters,
        "mamba_n_heads": mixer.heads,
        "mamba_n_groups": mixer.heads,
        "mamba_d_state": mixer.key_dim,
        "mamba_d_head": mixer.value_dim,
        "mamba_expand": width // config.hidden_size,
        "mamba_conv_bias": True,  # of zeros: llama.cpp needs one
    }
    if attention and config.num_attention_heads * config.head_dim != config.hidden_size:
        settings["head_dim"] = config.head_dim  # which the class does not declare, and reads

    def rows(layer: Any) -> Tensors:
        mixer, tensors = layer.self_attn, block(layer)
        gate, up, down = (tensors.pop(f"mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        tensors |= {"shared_mlp.input_linear.weight": torch.cat([gate, up]), "shared_mlp.output_linear.weight": down}
        if isinstance(mixer, Softmax):
            return tensors | {f"self_attn.{name}": tensor for name, tensor in mixer.state_dict().items()}
        return tensors | {
            "mamba.in_proj.weight": torch.cat([mixer.gate_proj.weight, projections(mixer, "vkq"), mixer.dt_proj.weight]),
            "mamba.conv1d.weight": convolutions(mixer, "vkq"),
            "mamba.dt_bias": mixer.dt_proj.bias,
            "mamba.A_log": mixer.A_log,
            "mamba.D": mixer.D,
            "mamba.norm.weight": mixer.norm.weight.repeat(mixer.heads),
            "mamba.out_proj.weight": mixer.o_proj.weight,
        }

    return build(student, settings, rows)


@torch.no_grad()
def qwen(student: Student) -> PreTrainedModel:
    """Convert Gated DeltaNet to Qwen 3.5's class for text, whose norms of the hidden state scale by 1 + weight."""
    config, teacher = student.config, teacher_config(student.config)
    check_layers(student, "Qwen3_5")
    mixer: Any = student.mixers[0]
    types = layer_types(student)
    settings = {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": len(types),
        "layer_types": types,
        "intermediate_size": teacher.intermediate_size,
        "num_attention_heads": config.num_attention_heads,  # of the idle layer; its width is the class's own, 256
        "num_key_value_heads": 1,
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": mixer.heads,
        "linear_key_head_dim": mixer.key_dim,
        "linear_value_head_dim": mixer.value_dim,
    }

    def rows(layer: Any) -> Tensors:
        mixer = layer.self_attn
        return {name: tensor - 1 if "norm" in name else tensor for name, tensor in block(layer).items()} | {
            "linear_attn.in_proj_qkv.weight": projections(mixer, "qkv"),
            "linear_attn.in_proj_z.weight": mixer.gate_proj.weight,
            "linear_attn.in_proj_b.weight": mixer.beta_proj.weight,
            "linear_attn.in_proj_a.weight": mixer.decay_proj.weight,
            "linear_attn.conv1d.weight": convolutions(mixer, "qkv"),
            "linear_attn.dt_bias": mixer.dt_bias,
            "linear_attn.A_log": mixer.A_log,
            "linear_attn.norm.weight": mixer.norm.weight,
            "linear_attn.out_proj.weight": mixer.o_proj.weight,
        }

    model = build(student, settings, rows)
    model.model.norm.weight -= 1
    return model


@torch.no_grad()
def kimi(student: Student) -> PreTrainedModel:
    """Convert KDA to Kimi Linear's class, without experts; DeltaNet, too, as a KDA that forgets nothing and is not gated.

    A log decay of -e^-80 leaves e^g = 1 to the bit. DeltaNet gets a gate of sigmoid(0) = 1/2, and norm weights twice as large.
    """
    teacher = teacher_config(student.config)
    check_layers(student, "KimiLinear")
    mixer: Any = student.mixers[0]
    types = layer_types(student)
    settings = {
        "model_type": "kimi_linear",
        "num_hidden_layers": len(types),
        "layer_types": types,
        "mlp_layer_types": ["dense"] * len(types),
        "intermediate_size": teacher.intermediate_size,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "linear_num_heads": mixer.heads,
        "linear_head_dim": mixer.key_dim,
        "tie_word_embeddings": False,  # the class has a head of its own
    }

    def rows(layer: Any) -> Tensors:
        mixer: Any = layer.self_attn
        tensors = {f"{part}_proj.weight": projections(mixer, part) for part in "qkv"} | {
            "conv1d.weight": convolutions(mixer, "qkv"),
            "b_proj.weight": mixer.beta_proj.weight,
            "o_proj.weight": mixer.o_proj.weight,
        }
        if isinstance(mixer, KDA):
            gates: dict[str, Any] = {"forget_gate.f": mixer.decay_proj, "g": mixer.gate_proj}
            tensors |= {f"{name}_{'ab'[i]}_proj.weight": gate[i].weight for name, gate in gates.items() for i in range(2)}
            tensors |= {"forget_gate.dt_bias": mixer.dt_bias, "forget_gate.A_log": mixer.A_log.view(1, 1, -1, 1)}
            tensors["o_norm.weight"] = mixer.norm.weight
        else:
            tensors["forget_gate.A_log"] = torch.full((1, 1, mixer.heads, 1), -80.0)
            tensors["o_norm.weight"] = 2 * mixer.norm.weight
        return block(layer) | {f"self_attn.{name}": tensor for name, tensor in tensors.items()}

    return build(student, settings, rows)


@torch.no_grad()
def xlstm(student: Student) -> PreTrainedModel:
    """Convert mLSTM to xLSTM's class, with soft caps so high that they change nothing.

    The class computes widths from shares of the hidden size, rounded down, and its cache rounds them to 64.
    """
    config, teacher = student.config, teacher_config(student.config)
    check_layers(student, "xLSTM")
    mixer: Any = student.mixers[0]
    keys, values = mixer.heads * mixer.key_dim, mixer.heads * mixer.value_dim
    refuse(student, {f"xLSTM's cache has widths in multiples of 64, not {keys} and {values}": keys % 64 + values % 64 > 0})
    settings = {
        "model_type": "xlstm",
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": mixer.heads,
        "norm_eps": config.rms_norm_eps,
        "qk_dim_factor": (keys + 0.5) / config.hidden_size,
        "v_dim_factor": (values + 0.5) / config.hidden_size,
        "ffn_proj_factor": (teacher.intermediate_size + 0.5) / config.hidden_size,
        "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": SOFT_CAP,
        "output_logit_soft_cap": SOFT_CAP,
        "autocast_kernel_dtype": "float32",
        "tie_word_embeddings": False,  # the class has a head of its own
    }

    def rows(layer: Any) -> Tensors:
        mixer, tensors = layer.self_attn, block(layer)
        inner = {part: projections(mixer, part) for part in "qkv"} | {
            "ogate_preact": mixer.gate_proj.weight,
            "igate_preact": mixer.input_proj.weight,
            "fgate_preact": mixer.forget_proj.weight,
            "multihead_norm": mixer.norm.weight.repeat(mixer.heads),
            "out_proj": mixer.o_proj.weight,
        }
        return {f"mlstm_layer.{name}.weight": tensor for name, tensor in inner.items()} | {
            "mlstm_layer.igate_preact.bias": mixer.input_proj.bias,
            "mlstm_layer.fgate_preact.bias": mixer.forget_proj.bias,
            "norm_mlstm.weight": tensors["input_layernorm.weight"],
            "norm_ffn.weight": tensors["post_attention_layernorm.weight"],
            "ffn.proj_up_gate.weight": tensors["mlp.gate_proj.weight"],
            "ffn.proj_up.weight": tensors["mlp.up_proj.weight"],
            "ffn.proj_down.weight": tensors["mlp.down_proj.weight"],
        }

    names = {LAYERS: "backbone.blocks.", "model.embed_tokens.": "backbone.embeddings.", "model.norm.": "backbone.out_norm."}
    return build(student, settings, rows, names)


UNKNOWN = "no class is known that computes the same"
# by mixer: the rewriting, or why there is none
TARGETS: dict[str, Callable[[Student], PreTrainedModel] | str] = {
    "mamba2": granite,
    "gated_delta_net": qwen,
    "kda": kimi,
    "delta_net": kimi,
    "mlstm": xlstm,
    **dict.fromkeys(("gla", "hgrn2", "metala"), "classes of transformers have a decay per key channel only with a delta rule"),
    "retnet": "no class of transformers has a fixed decay per head and RoPE",
    **dict.fromkeys(("rebased", "hedgehog"), "no class of transformers has linear attention with normalised rows"),
    "swa": "no class of transformers attends to the first tokens beside a window",
    "rwkv7": "the RWKV of transformers is version 4",
}
