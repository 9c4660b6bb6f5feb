"""Weights from teacher to student: everything outside attention, and of attention what Table 1 says the mixer can take."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_pl.mixers import Softmax
from distill_pl.student.modeling import Student, teacher_config

ATTENTION = ".self_attn."


def expand_kv(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """A k or v projection of `kv_heads` heads for `heads`: [kv_heads * K, ...] -> [heads * K, ...].

    Whole heads are repeated, so the rows are cut into heads first: query head h reads kv head h * kv_heads // heads.
    """
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, student: Student, attention: bool) -> list[str]:
    """Copy the teacher's weights in place -> the names of the student's tensors that received some.

    Outside attention every tensor is copied by its name, which the two share. With `attention`, and in the layers that a
    hybrid keeps (`softmax_layers`) in any case, each mixer also gets the
    projections in its `copies`, with the q and k norms that go with them, kv heads repeated where the student has more.
    A tensor that is missing, or has another shape, is an error: nothing is left out silently.
    """
    source, target = teacher.state_dict(), student.state_dict()
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
        if weight.shape != target[name].shape and (".k_proj." in name or ".v_proj." in name):
            weight = expand_kv(weight, heads, kv_heads)
        if weight.shape != target[name].shape:
            raise ValueError(f"{name}: {tuple(weight.shape)} in the teacher, {tuple(target[name].shape)} in the student")
        target[name].copy_(weight)
    return wanted


def as_transformer(student: Student) -> PreTrainedModel:
    """A student that is softmax throughout, as its teacher's own class (a Llama, say); any other student as it is."""
    if not all(isinstance(mixer, Softmax) and mixer.rope for mixer in student.mixers):
        return student
    config = teacher_config(student.config)
    config.num_key_value_heads = student.config.num_key_value_heads
    config.tie_word_embeddings = student.config.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(student.state_dict())
    return model
