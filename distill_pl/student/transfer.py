"""Copying weights from teacher to student: all outside attention, and the projections that a mixer can take (Table 1)."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.mixers import Softmax
from distill_pl.student.modeling import Student, join_projections, split_joint_projections, teacher_config

ATTENTION = ".self_attn."


def expand_kv(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Repeat the heads of a k or v projection, weight or bias: [kv_heads * K, ...] -> [heads * K, ...].

    Whole heads are repeated, not rows: query head h gets kv head h * kv_heads // heads, as grouped-query attention reads it.
    """
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, student: Student, attention: bool) -> list[str]:
    """Copy the teacher's weights into the student in place and return the names of the student's tensors that were set.

    Outside attention all tensors are copied by name (section 4). With `attention`, a mixer also gets the projections in its
    `copies` (Table 1) with their q and k norms, kv heads repeated where the student has more, and one projection of q, k and v
    taken apart; layers in `softmax_layers` get them always. Raises KeyError for a tensor that the teacher lacks and ValueError
    for one of another shape.
    """
    source, target = teacher.state_dict(), student.state_dict()
    split_joint_projections(source, student.config)
    wanted = [name for name in target if ATTENTION not in name]
    for index, mixer in enumerate(student.mixers):
        if attention or index in student.config.softmax_layers:
            prefix = f"model.layers.{index}{ATTENTION}"
            parts = [f"{part}_proj." for part in mixer.copies] + [f"{part}_norm." for part in mixer.copies if part in "qk"]
            wanted += [name for name in target if name.startswith(tuple(prefix + part for part in parts))]
    heads = student.config.num_attention_heads
    kv_heads = teacher.config.num_key_value_heads
    for name in wanted:
        weight = source[name]
        if weight.shape != target[name].shape and any(part in name for part in (".k_proj.", ".v_proj.", ".k_norm.")):
            weight = expand_kv(weight, heads, kv_heads)
        if weight.shape != target[name].shape:
            raise ValueError(f"{name}: {tuple(weight.shape)} in the teacher, {tuple(target[name].shape)} in the student")
        target[name].copy_(weight)
    return wanted


@torch.no_grad()
def copy_student(source: PreTrainedModel, student: Student) -> list[int]:
    """Copy another student's weights in place: all outside attention, and each mixer that has the same class and weights.

    source: a student of the same teacher, or what a student of softmax attention is exported as. Returns the layers whose
    mixers were not copied. Raises InputError where a tensor outside attention does not fit.
    """
    layers = [model.config.num_hidden_layers for model in (source, student)]
    if layers[0] != layers[1]:
        raise InputError(f"student.start_from: it has {layers[0]} layers, the teacher {layers[1]}: give its own teacher")
    tensors, target = source.state_dict(), student.state_dict()
    split_joint_projections(tensors, student.config)
    if student.config.tie_word_embeddings and not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        raise InputError("student.start_from: its head is not tied to the embeddings, as the student's is: choose shape paper")
    left = []
    for index, mixer in enumerate(student.mixers):
        prefix = f"model.layers.{index}{ATTENTION}"
        kind = type(source.mixers[index]) if isinstance(source, Student) else Softmax
        shapes = [{name: x.shape for name, x in of.items() if name.startswith(prefix)} for of in (tensors, target)]
        if kind is type(mixer) and shapes[0] == shapes[1]:
            for name in shapes[0]:
                target[name].copy_(tensors[name])
        else:
            left.append(index)
    for name, tensor in target.items():
        if ATTENTION not in name:
            given = tensors.get(name)
            if given is None or given.shape != tensor.shape:
                shape = "not there" if given is None else f"of shape {tuple(given.shape)}"
                raise InputError(
                    f"student.start_from: its {name} is {shape}, the student's has shape {tuple(tensor.shape)}: start from a "
                    "student of the same teacher and student.shape"
                )
            tensor.copy_(given)
    return left


def as_transformer(student: Student) -> PreTrainedModel:
    """Convert a student whose mixers are all softmax with RoPE to its teacher's class, such as Llama; return others as is."""
    if not all(isinstance(mixer, Softmax) and mixer.rope for mixer in student.mixers):
        return student
    config = teacher_config(student.config)
    config.num_key_value_heads = student.mixers[0].kv_count
    config.tie_word_embeddings = student.config.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(config)
    tensors = student.state_dict()
    join_projections(tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model
