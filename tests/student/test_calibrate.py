"""A calibrated start lowers each layer's error on text that it was not fitted to, and leaves what is right as it is."""

import pytest
import torch
from helpers import some_tokens
from torch import nn

from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.student.calibrate import Products, calibrate, changes, constant_reader, hold
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher


@pytest.fixture
def tokens(teacher) -> torch.Tensor:
    return some_tokens(teacher, rows=24, length=16)


def test_a_softmax_student_stays_its_teacher(teacher, tokens):
    student = StudentFactory("softmax", init="calibrated").build(teacher, seed=0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert all(0 <= abs(error) < 1e-9 for errors in calibrate(student, teacher, tokens) for error in errors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_errors_fall_on_held_out_text(teacher, tokens, name):
    if name == "softmax":
        pytest.skip("it has no error")
    student = StudentFactory(name, init="calibrated").build(teacher, seed=0)
    outside = {key: tensor.clone() for key, tensor in student.state_dict().items() if ".self_attn." not in key}
    errors = list(calibrate(student, teacher, tokens))
    assert len(errors) == len(student.mixers) and student.training
    assert all(after <= before for before, after in errors)
    if name not in ("swa", "hedgehog"):  # the one is softmax attention at this length, the other is as good as o_proj makes it
        assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert all(torch.equal(tensor, student.state_dict()[key]) for key, tensor in outside.items())


def test_equal_arguments_give_equal_weights(teacher, tokens):
    one, two = (StudentFactory("gla", init="calibrated").build(teacher, seed=0) for _ in range(2))
    for student in (one, two):
        list(calibrate(student, teacher, tokens))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_teacher_in_bf16_is_calibrated_to(teacher, teacher_folder, tokens):
    half = Teacher(str(teacher_folder), torch.bfloat16)
    student, other = (StudentFactory("gla", init="calibrated").build(teacher, seed=0) for _ in range(2))
    (errors, *_), (expected, *_) = (list(calibrate(*pair, tokens)) for pair in [(student, half), (other, teacher)])
    assert errors == pytest.approx(expected, rel=0.1)  # in another precision, other settings may be chosen
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


def test_ridge_regression_finds_the_map():
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(*shape, generator=generator) for shape in [(200, 8), (5, 8)])
    products = Products()
    for part in features.view(4, 50, 8):
        products.add(part, part @ weight.mT)
    torch.testing.assert_close(products.solve(1e-12).float(), weight)
    assert products.error(weight) == pytest.approx(0, abs=1e-9) and products.error(0 * weight) == pytest.approx(1)
    other = weight + 1
    expected = (features @ (other - weight).mT).square().sum() / (features @ weight.mT).square().sum()
    assert products.error(other) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "projection",
    [nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 4, bias=False)),
     nn.Sequential(nn.Linear(6, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 4, bias=False))],
)  # fmt: skip
@torch.no_grad()
def test_a_projection_is_held_at_a_value(projection):
    hidden = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([9.0, 0, 0, 0, 0, 0])
    hidden[..., 0] = 9
    hold(projection, 2.0, constant_reader([hidden[:1], hidden[1:]]))
    torch.testing.assert_close(projection(hidden), torch.full((2, 10, 4), 2.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_every_setting_can_be_tried(teacher, mixer):
    student = StudentFactory(mixer, init="qkv").build(teacher, seed=0)
    own = student.mixers[0]
    for change in changes(own, student.config, torch.ones(student.config.hidden_size)):
        before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
        change()
        assert any(not torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_what_was_learned_is_not_calibrated_away():
    with pytest.raises(InputError, match="student.init calibrated would undo what student.start_from 'x' has learned"):
        StudentFactory("gla", init="calibrated", start_from="x")
