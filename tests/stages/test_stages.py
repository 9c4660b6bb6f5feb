"""Each stage's loss is its equation, is zero for a student that is the teacher, and falls where it is trained."""

import inspect
import math

import lightning as L
import pytest
import torch
from helpers import some_tokens
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from shared_fixtures import in_turn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from distill_pl.errors import Diverged, InputError
from distill_pl.losses import matrix_distance
from distill_pl.mixers import MIXERS
from distill_pl.mixers.mixer import Paper
from distill_pl.stages import STAGES, HiddenAlignStage, KDStage, MatrixMixingStage, Stage
from distill_pl.stages.matrix_mixing import ENTRIES_AT_ONCE, mixing_parameters, probed_distance, squared_distance
from distill_pl.stages.optim import adamw
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher

LENGTH = 16


@pytest.fixture
def tokens(teacher) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, teacher.config.vocab_size, (2, LENGTH), generator=generator)


def has_unit_keys(stage: Stage, tokens: Tensor) -> bool:
    """Return whether the op's q and k have unit length: then no entry of A exceeds scale, and A cannot reach a softmax's."""
    layer = next(stage.teacher.layers(tokens))
    with torch.no_grad():
        inputs, _ = stage.student.mixers[0].inputs(layer.input, layer.position, None, None)
    return all((x.norm(dim=-1) - 1).abs().max() < 1e-3 for x in (inputs.q, inputs.k))


def make(stage: type[Stage], teacher: Teacher, name: str, init: str = "fresh", **options) -> Stage:
    made = stage(StudentFactory(name, init=init).build(teacher, seed=0), teacher, **options)
    made.configure_model()
    return made


def loss_of(stage: Stage, tokens: Tensor, seed: int = 0) -> float:
    with torch.no_grad():
        return stage.losses(tokens, seed)[0].item()


# ---- the equations


@pytest.mark.parametrize(("norm", "shape"), [("frobenius", "qwen3"), ("mse", "llama")])
def test_matrix_mixing_is_equation_7(variant, tokens, name, norm, shape):
    teacher = variant(shape)
    stage = make(MatrixMixingStage, teacher, name, estimator="exact", norm=norm)
    eager = AutoModelForCausalLM.from_pretrained(teacher.path, attn_implementation="eager").eval()
    distances = []
    with torch.no_grad():
        theirs = eager(tokens, output_attentions=True, output_hidden_states=True)
        for index, attention in enumerate(theirs.attentions):
            hidden = theirs.hidden_states[index]
            position = eager.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
            normed = eager.model.layers[index].input_layernorm(hidden)
            difference = attention - stage.student.mixers[index].matrix(normed, position)
            if norm == "mse":
                distances.append(difference.square().mean())
            else:
                distances.append(difference.square().sum((-2, -1)).sqrt().mean())
        loss, parts = stage.losses(tokens, seed=0)
    torch.testing.assert_close(parts, torch.stack(distances), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, torch.stack(distances).mean(), rtol=1e-4, atol=0)


def distance(student: Tensor, teacher: Tensor, norm: str) -> Tensor:
    difference = student - teacher
    return torch.linalg.vector_norm(difference, dim=-1).mean() if norm == "l2" else difference.square().mean()


@in_turn(("norm",), ("l2",), ("mse",))
def test_hidden_alignment_is_equation_8(variant, tokens, name, norm):
    """Compare with blocks tapped by hooks, since the last of transformers' hidden_states is after the final norm."""
    teacher = variant("qwen3")
    stage = make(HiddenAlignStage, teacher, name, norm=norm)
    model = AutoModelForCausalLM.from_pretrained(teacher.path).eval()
    distances = []

    def compare(index):
        def hook(block, inputs, output):
            with torch.no_grad():
                position = model.model.rotary_emb(output, torch.arange(LENGTH)[None])
                student = stage.student.model.layers[index](inputs[0], position_embeddings=position)
            distances.append(distance(student, output, norm))

        return hook

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(compare(index))
    with torch.no_grad():
        model(tokens)
        loss, parts = stage.losses(tokens, seed=0)
    torch.testing.assert_close(parts, torch.stack(distances), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, torch.stack(distances).mean(), rtol=1e-4, atol=0)


@in_turn(("norm",), ("l2",), ("mse",))
def test_mixers_may_be_aligned_to_what_attention_computes(variant, tokens, name, norm):
    teacher = variant("qwen3")
    stage = make(HiddenAlignStage, teacher, name, target="mixer", norm=norm)
    model = AutoModelForCausalLM.from_pretrained(teacher.path).eval()
    distances = []

    def compare(index):
        def hook(attention, arguments, keywords, output):
            with torch.no_grad():
                student, _ = stage.student.mixers[index](keywords["hidden_states"], keywords["position_embeddings"])
            distances.append(distance(student, output[0], norm))

        return hook

    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(compare(index), with_kwargs=True)
    with torch.no_grad():
        model(tokens)
        loss, parts = stage.losses(tokens, seed=0)
    torch.testing.assert_close(parts, torch.stack(distances), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, torch.stack(distances).mean(), rtol=1e-4, atol=0)
    assert next(teacher.layers(tokens)).mixed is None


@in_turn(("temperature",), (1.0,), (2.0,))
def test_distillation_is_equations_5_and_6(variant, tokens, name, temperature):
    teacher = variant("llama_untied")
    stage = make(KDStage, teacher, name, alpha=0.7, temperature=temperature)
    model = AutoModelForCausalLM.from_pretrained(teacher.path).eval()
    with torch.no_grad():
        student, expected = (network(tokens).logits[:, :-1] for network in (stage.student, model))
        loss, parts = stage.losses(tokens, seed=0)
    ce = cross_entropy(student.flatten(0, 1), tokens[:, 1:].flatten())
    p, q = ((logits / temperature).log_softmax(-1) for logits in (expected, student))
    kl = (p.exp() * (p - q)).sum(-1).mean() * temperature**2
    torch.testing.assert_close(parts, torch.stack([ce, kl]), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, ce + 0.7 * kl, rtol=1e-4, atol=0)


def test_without_alpha_there_is_no_teacher(teacher, tokens, name):
    stage = make(KDStage, teacher, name, alpha=0.0)
    stage.teacher = None
    loss, parts = stage.losses(tokens, seed=0)
    expected = stage.student(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert stage.part_names == ["train/ce"] and parts.shape == (1,)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "stable_decay"])
def test_schedules_of_distillation(teacher, schedule):
    steps = 200
    plain, floored = (make(KDStage, teacher, "gla", schedule=schedule, final_lr=floor) for floor in (0.0, 0.2))
    shares = [plain.share_of_lr(step, steps) for step in range(steps)]
    assert shares[:20] == pytest.approx([(step + 1) / 20 for step in range(20)]) and 0 <= shares[-1] < 0.06
    middle = {"linear": 0.5, "cosine": 0.5, "stable_decay": 1.0}[schedule]
    assert shares[110] == pytest.approx(middle, abs=0.01)
    assert [floored.share_of_lr(step, steps) for step in range(20)] == shares[:20]
    assert [floored.share_of_lr(step, steps) for step in range(20, steps)] == pytest.approx(
        [0.2 + 0.8 * x for x in shares[20:]]
    )


def test_distillation_may_train_the_mixers_alone(teacher, tokens):
    stage = make(KDStage, teacher, "gla", train="mixers")
    stage.losses(tokens, seed=0)[0].backward()
    trained = {name for name, parameter in stage.student.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in stage.student.named_parameters() if ".self_attn." in name}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ce": 0.0, "alpha": 0.0}, "kd.ce 0 and kd.alpha 0"),
        ({"alpha": 0.0, "divergence": "reverse"}, "kd.alpha 0 follows no teacher"),
        ({"alpha": 0.0, "top_k": 3}, "kd.alpha 0 follows no teacher"),
        ({"train": "mixers", "other_lr": 0.1}, "kd.other_lr 0.1"),
    ],
)
def test_objectives_that_contradict_themselves(teacher, options, says):
    with pytest.raises(InputError, match=says):
        make(KDStage, teacher, "gla", **options)


# ---- a student that is the teacher


def test_exact_matrices_need_no_trainer(teacher, tokens):
    stage = MatrixMixingStage(StudentFactory("gla").build(teacher, 0), teacher, estimator="exact")
    loss, _ = stage.losses(tokens, seed=0)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in stage.student.parameters())


@pytest.mark.parametrize("estimator", ["exact", "probe"])
def test_a_student_that_is_the_teacher_has_no_matrix_distance(any_teacher, tokens, estimator):
    assert loss_of(make(MatrixMixingStage, any_teacher, "softmax", "qkv", estimator=estimator), tokens) < 5e-6
    assert loss_of(make(MatrixMixingStage, any_teacher, "softmax", "fresh", estimator=estimator), tokens) > 0.1


@pytest.mark.parametrize("target", ["block", "mixer"])
def test_a_student_that_is_the_teacher_has_no_hidden_distance(any_teacher, tokens, target):
    assert loss_of(make(HiddenAlignStage, any_teacher, "softmax", "qkv", target=target), tokens) < 5e-5
    assert loss_of(make(HiddenAlignStage, any_teacher, "softmax", "fresh", target=target), tokens) > 0.1


def test_a_student_that_is_the_teacher_has_its_cross_entropy(any_teacher, tokens):
    stage = make(KDStage, any_teacher, "softmax", "qkv", temperature=2.0)
    ce, kl = stage.losses(tokens, seed=0)[1].tolist()
    with torch.no_grad():
        logits = any_teacher.model(tokens).logits[:, :-1]
    assert ce == pytest.approx(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), rel=1e-5)
    assert abs(kl) < 1e-6
    assert make(KDStage, any_teacher, "softmax", "fresh").losses(tokens, seed=0)[1][1] > 0.1


# ---- the probe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "mlstm"])  # below, products with the signs are those of each mixer's matrix
def test_probe_is_an_unbiased_estimate(teacher, tokens, name):
    stage = make(MatrixMixingStage, teacher, name, estimator="probe", norm="mse", probes=32)
    exact = loss_of(make(MatrixMixingStage, teacher, name, estimator="exact", norm="mse"), tokens)
    estimates = torch.tensor([loss_of(stage, tokens, seed) for seed in range(50)], dtype=torch.float64)
    error = estimates.std() / math.sqrt(len(estimates))
    assert error < 0.05 * exact
    assert abs(estimates.mean() - exact) < 4 * error


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_probe_is_exact_where_its_signs_are_orthogonal(variant, tokens, name, shape):
    """Probe with the columns of a Hadamard matrix, over which the mean of z z^T is the identity."""
    teacher = variant(shape)
    student_layer = StudentFactory(name, init="fresh").build(teacher, seed=0).model.layers[0]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < LENGTH:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    layer = next(teacher.layers(tokens))
    with torch.no_grad():
        exact = squared_distance(student_layer, layer.input, layer.query, layer.key, layer.scale, layer.position)
        probed = probed_distance(student_layer, layer, hadamard[None, :, None, :])
    torch.testing.assert_close(probed, exact, rtol=1e-4, atol=0)


@pytest.mark.slow
@in_turn(("norm", "bf16"), ("frobenius", False), ("frobenius", True), ("mse", False))
def test_exact_matrices_a_sequence_at_a_time_are_those_of_all_at_once(teacher_folder, tokens, name, norm, bf16, monkeypatch):
    """Compare losses and gradients, which are made along with them, with autograd's of the whole batch."""
    teacher, found = Teacher(str(teacher_folder), torch.bfloat16 if bf16 else torch.float32), []
    for entries in (2**30, 1, None):
        monkeypatch.setitem(ENTRIES_AT_ONCE, "cpu", entries)
        stage = make(MatrixMixingStage, teacher, name, estimator="exact", norm=norm)
        trained = [p for p in stage.student.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if entries:
                loss, _ = stage.losses(tokens, seed=0)
            else:
                layers = zip(stage.student.model.layers, teacher.layers(tokens), strict=True)
                squares = [squared_distance(x, y.input, y.query, y.key, y.scale, y.position) for x, y in layers]
                loss = torch.stack([matrix_distance(squared, LENGTH, norm) for squared in squares]).mean()
        gradients = torch.autograd.grad(3 * loss, trained)
        found.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    *ours, (expected, plain) = found
    for loss, gradient in ours:
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (gradient - plain).norm() < (1e-2 if bf16 else 1e-5) * plain.norm()


@in_turn(("norm",), ("frobenius",), ("mse",))
def test_gradient_of_the_probe_points_where_the_exact_one_does(teacher, tokens, name, norm):
    gradients = []
    for estimator in ("exact", "probe"):
        stage = make(MatrixMixingStage, teacher, name, estimator=estimator, norm=norm, probes=512)
        stage.losses(tokens, seed=0)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stage.student.parameters() if p.requires_grad]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert gradients[1].norm() / gradients[0].norm() == pytest.approx(1, abs=0.1)


def test_the_seed_makes_the_probe(teacher, tokens, name):
    stage = make(MatrixMixingStage, teacher, name, estimator="probe", probes=4)
    start = torch.get_rng_state()
    first, again, other = (loss_of(stage, tokens, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), start)


def test_sequences_are_judged_one_by_one(teacher, tokens, name):
    """Check that a batch's loss is the mean of its rows', so that it does not depend on how many ranks share the batch."""
    estimators = [(MatrixMixingStage, {"estimator": estimator}) for estimator in ("exact", "probe")]
    for kind, options in [*estimators, (HiddenAlignStage, {}), (KDStage, {})]:
        stage = make(kind, teacher, name, **options)
        rows = [loss_of(stage, row[None]) for row in tokens]
        assert loss_of(stage, tokens) == pytest.approx(sum(rows) / len(rows), rel=1e-4)


# ---- training


def names_of(stage: Stage) -> set[str]:
    return {key for key, parameter in stage.student.named_parameters() if parameter.requires_grad}


def test_each_stage_trains_its_own_parameters(variant, name):
    teacher = variant("qwen3")  # with norms of q and k
    student = StudentFactory(name).build(teacher, seed=0)
    everything = {key for key, _ in student.named_parameters()}
    attention = {key for key in everything if ".self_attn." in key}
    wanted = {id(p) for mixer in student.mixers for p in mixing_parameters(mixer)}
    mixing = {key for key, parameter in student.named_parameters() if id(parameter) in wanted}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"} <= mixing
    assert mixing < attention < everything
    expected = [(MatrixMixingStage, mixing), (HiddenAlignStage, attention), (KDStage, everything)]
    for kind, trained in expected + expected[::-1]:  # whatever the stage before it left
        stage = kind(student, teacher)
        stage.configure_model()
        assert names_of(stage) == trained


@pytest.mark.parametrize("kind", [MatrixMixingStage, HiddenAlignStage])
def test_kept_layers_are_not_aligned(teacher, tokens, kind):
    """They are the teacher's but for rounding, on which Adam would take whole steps."""
    stage = kind(StudentFactory("gla", softmax_layers=[0]).build(teacher, seed=0), teacher)
    stage.configure_model()
    trained = names_of(stage)
    assert trained and not any(name.startswith("model.layers.0.") for name in trained)
    stage.losses(tokens, seed=0)[0].backward()
    with pytest.raises(InputError, match="all layers keep the teacher's attention"):
        kind(StudentFactory("gla", softmax_layers=[0, 1]).build(teacher, seed=0), teacher)


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_gradients_reach_what_trains_and_nothing_else(teacher, tokens, name, kind):
    stage = make(kind, teacher, name)
    stage.losses(tokens, seed=0)[0].backward()
    for key, parameter in stage.student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None, key
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@pytest.mark.parametrize("estimator", ["exact", "probe"])
def test_matrix_mixing_of_a_student_in_the_papers_shape(teacher, tokens, name, estimator):
    student = StudentFactory(name, "fresh", "paper", softmax_layers=[1]).build(teacher, seed=0)
    stage = MatrixMixingStage(student, teacher, estimator=estimator)
    stage.configure_model()
    stage.losses(tokens, seed=0)[0].backward()
    gradients = [p.grad for p in student.mixers[0].parameters() if p.requires_grad]
    assert gradients and all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_matrix_mixing_refuses_another_number_of_heads(teacher, monkeypatch):
    monkeypatch.setattr(MIXERS["mlstm"], "paper", Paper(heads=2, key=1 / 2))
    student = StudentFactory("mlstm", "fresh", "paper").build(teacher, seed=0)
    with pytest.raises(InputError, match="the student has 2 heads, the teacher 4; choose student.shape copyable"):
        MatrixMixingStage(student, teacher)


TRAINED = {
    "exact frobenius": (MatrixMixingStage, {"estimator": "exact", "norm": "frobenius"}),
    "exact mse": (MatrixMixingStage, {"estimator": "exact", "norm": "mse"}),
    "probe frobenius": (MatrixMixingStage, {"estimator": "probe", "norm": "frobenius"}),
    "hidden": (HiddenAlignStage, {}),
    "kl": (KDStage, {"alpha": 10.0}),  # else the random tokens themselves are learnt
}


@pytest.mark.slow
@in_turn(("objective",), *((objective,) for objective in TRAINED))
def test_training_lowers_the_loss(teacher, tokens, name, objective):
    kind, options = TRAINED[objective]
    stage = make(kind, teacher, name, **options)
    frozen = {key: p.clone() for key, p in stage.student.named_parameters() if not p.requires_grad}
    optimizer = adamw(stage.student.parameters(), lr=3e-2, weight_decay=0.0)

    def value() -> float:
        loss, parts = stage.losses(tokens, seed=1000)
        return (parts[1] if kind is KDStage else loss).item()

    before = value()
    for step in range(20):
        loss, _ = stage.losses(tokens, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert value() < before * (0.7 if kind is MatrixMixingStage and has_unit_keys(stage, tokens) else 0.6)
    assert all(torch.equal(p, frozen[key]) for key, p in stage.student.named_parameters() if key in frozen)


def test_part_names_fit_the_parts(teacher, tokens, name):
    for kind in STAGES.values():
        stage = make(kind, teacher, name)
        _, parts = stage.losses(tokens, seed=0)
        assert parts.shape == (len(stage.part_names),)
        assert not parts.requires_grad
        assert len(set(stage.part_names)) == len(stage.part_names)


def test_the_teacher_is_no_part_of_the_module(teacher):
    stage = make(KDStage, teacher, "gla")
    own = {id(parameter) for parameter in stage.parameters()}
    assert own == {id(parameter) for parameter in stage.student.parameters()}
    assert not any("teacher" in key for key in stage.state_dict() if not key.startswith("metrics."))


def test_validation_reports_both_models(teacher, tokens, name):
    stage = make(MatrixMixingStage, teacher, name, estimator="exact")
    other = tokens.flip(0, 1)[:1]
    with torch.no_grad():
        for index, batch in enumerate((tokens, other)):
            stage.validation_step(batch, index)
    stage.on_validation_epoch_end()
    every = torch.cat([tokens, other])
    with torch.no_grad():
        for key, model in [("teacher_ce", teacher.model), ("student_ce", stage.student)]:
            logits = model(every).logits[:, :-1]
            expected = cross_entropy(logits.flatten(0, 1), every[:, 1:].flatten()).item()
            assert stage.validation[key] == pytest.approx(expected, rel=1e-4)
    assert stage.validation["loss"] == pytest.approx(loss_of(stage, every), rel=1e-4)
    with torch.no_grad():
        stage.validation_step(tokens, 0)
    stage.on_validation_epoch_end()
    assert stage.validation["loss"] == pytest.approx(loss_of(stage, tokens), rel=1e-4)  # nothing of the run before


# ---- what is refused


@pytest.mark.slow
@in_turn(("layer",), (0,), (1,))
@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_a_loss_that_is_not_finite_names_stage_and_layer(teacher, tokens, name, kind, layer):
    stage = make(kind, teacher, name)
    stage.batch = tokens
    with torch.no_grad():
        stage.student.mixers[layer].q_proj.weight[3, 4] = float("nan")
    loss, parts = stage.losses(tokens, seed=0)
    stage.values = torch.cat([loss.detach()[None], parts])
    loss.backward()
    start = [p.clone() for p in stage.student.parameters()]
    with pytest.raises(Diverged, match=f"{kind.name}: .*layer.{layer}") as error:
        stage.configure_gradient_clipping(adamw(stage.student.parameters(), 1e-3, 0.0))
    assert "\n" not in str(error.value)
    for parameter, before in zip(stage.student.parameters(), start, strict=True):
        assert torch.equal(parameter.nan_to_num(), before.nan_to_num())


def fused_adamw(parameters) -> AdamW:
    """Build AdamW with its fused implementation, which is the default on a GPU only."""
    optimizer = adamw(parameters, 1e-3, 0.0)
    for options in (optimizer.defaults, *optimizer.param_groups):
        options["fused"] = True
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("end", ["configure_gradient_clipping", "on_validation_start", "on_save_checkpoint", "on_train_end"])
@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_a_fused_optimizer_takes_no_step_that_is_not_finite(teacher_folder, tokens, kind, end):
    """Check that a step that is not finite changes nothing and is reported by each of the hooks that ask later."""
    stage = make(kind, Teacher(str(teacher_folder), torch.bfloat16), "gla")
    stage.batch = tokens
    optimizer = fused_adamw(stage.student.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = stage.losses(tokens, seed=0)
        stage.values = torch.cat([loss.detach()[None], parts])
        loss.backward()
        stage.configure_gradient_clipping(optimizer)
        optimizer.step()

    start = [p.clone() for p in stage.student.parameters()]
    step()
    stepped = [p.clone() for p in stage.student.parameters()]
    assert any(not torch.equal(p, before) for p, before in zip(stepped, start, strict=True))
    stage.student.mixers[1].q_proj.weight.register_hook(lambda gradient: gradient / 0)
    step()
    assert all(torch.equal(p, before) for p, before in zip(stage.student.parameters(), stepped, strict=True))
    options = {"configure_gradient_clipping": optimizer, "on_save_checkpoint": {}}
    with pytest.raises(Diverged, match=rf"{kind.name}: .*in the gradient of .*layers.1.*q_proj.weight; the last checkpoint"):
        getattr(stage, end)(*([options[end]] if end in options else []))
    stage.finite.verify(stage)  # raised once


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_gradients_are_clipped_together(teacher, tokens, fused):
    stage = make(HiddenAlignStage, teacher, "gla", clip=0.01)
    stage.batch = tokens
    stage.losses(tokens, seed=0)[0].backward()
    before = [p.grad.clone() for p in stage.student.parameters() if p.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in before]).norm()
    assert norm > 0.01
    optimizer = fused_adamw(stage.student.parameters()) if fused else adamw(stage.student.parameters(), 1e-3, 0.0)
    stage.configure_gradient_clipping(optimizer)
    torch.testing.assert_close(stage.grad_norm, norm)
    if fused:  # it clips as it steps
        optimizer.step()
    after = [p.grad for p in stage.student.parameters() if p.grad is not None]
    for gradient, start in zip(after, before, strict=True):
        torch.testing.assert_close(gradient, start * 0.01 / norm, rtol=1e-3, atol=0)


CHOICES = [(kind, key) for kind in (StudentFactory, *STAGES.values())
           for key, value in inspect.signature(kind).parameters.items() if "Literal" in str(value.annotation)]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), CHOICES)
def test_a_choice_that_there_is_not_is_refused_and_not_taken_for_another(teacher, kind, key):
    with pytest.raises(InputError, match=f"{key} 'else' is unknown: choose one of "):
        if kind is StudentFactory:
            StudentFactory(**{key: "else"})
        else:
            kind(StudentFactory("gla").build(teacher, seed=0), teacher, **{key: "else"})
    assert len(CHOICES) >= 11


NO_BATCH = {  # what a loader may yield -> what is said of it
    "dict": (lambda tokens: {"input_ids": tokens}, "is dict: .* token ids"),
    "list": (lambda tokens: [tokens], "is list: .* token ids"),
    "array": (lambda tokens: tokens.numpy(), "is ndarray: .* token ids"),
    "floats": (lambda tokens: tokens.float(), r"is torch.float32 \[2, 16\]: .* int64"),
    "one row": (lambda tokens: tokens[0], r"is torch.int64 \[16\]: .* \[B, T\]"),
    "no rows": (lambda tokens: tokens[:0], r"of shape \[0, 16\]"),
    "nothing to predict": (lambda tokens: tokens[:, :1], r"of shape \[2, 1\]: give rows of at least 2"),
    "beyond the positions": (lambda tokens: tokens.repeat(1, 9), "rows of 144 tokens, the teacher reads 128"),
    "beyond the vocabulary": (lambda tokens: tokens + 300, "to .*, the vocabulary those from 0 to 299"),
    "padding": (lambda tokens: tokens.where(tokens > 99, -100), "ids from -100 .* without padding"),
}


@pytest.mark.parametrize("what", NO_BATCH)
@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_what_is_no_batch_is_refused_with_and_without_lightning(teacher, tokens, kind, what):
    change, says = NO_BATCH[what]
    stage, batch = make(kind, teacher, "gla"), change(tokens)
    rows = DataLoader([batch], 1, collate_fn=lambda batches: batches[0])
    for read in (lambda: stage.losses(batch, 0), lambda: trainer(max_steps=1).fit(stage, rows)):
        with pytest.raises(InputError, match=f"^{kind.name}: a batch .*{says}"):
            read()


def test_rows_beyond_a_sliding_window_are_refused(save_model, tokens):
    stage = make(KDStage, Teacher(str(save_model("mistral", sliding_window=LENGTH))), "gla")
    assert stage.losses(tokens, 0)[0].isfinite()
    with pytest.raises(InputError, match="rows of 32 tokens, the teacher reads 16"):
        stage.losses(tokens.repeat(1, 2), 0)


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize(("changes", "says"), [
    ({"vocab_size": 320}, "vocab_size is 300 in the student, 320 in the teacher"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 2 in the student, 3 in the teacher"),
    ({"hidden_size": 64}, "hidden_size is 32 in the student, 64 in the teacher"),
])  # fmt: skip
def test_a_teacher_that_is_not_the_students_is_refused(teacher, tokens, save_model, kind, changes, says):
    student, other = StudentFactory("gla").build(teacher, seed=0), Teacher(str(save_model("llama", **changes)))
    if kind is KDStage and "vocab_size" not in changes:  # distributions are compared, whatever computes them
        assert kind(student, other).losses(tokens, 0)[0].isfinite()
        return
    with pytest.raises(InputError, match=f"^{kind.name}: {says}"):
        kind(student, other)


def test_models_of_transformers_are_no_student_and_no_teacher(teacher):
    student = StudentFactory("gla").build(teacher, seed=0)
    with pytest.raises(InputError, match="kd: teacher is a LlamaForCausalLM: give a Teacher"):
        KDStage(student, teacher.model)
    with pytest.raises(InputError, match="kd: student is a LlamaForCausalLM: give a Student"):
        KDStage(teacher.model, teacher)
    with pytest.raises(InputError, match="kd: teacher is None: give a Teacher"):
        trainer(max_steps=1).fit(KDStage(student, None, alpha=0), loader(teacher))


# ---- a Trainer of one's own


def trainer(**options) -> L.Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu"} | off | options)


def loader(teacher: Teacher) -> DataLoader:
    return DataLoader(some_tokens(teacher, rows=8), batch_size=2)


class LearningRates(L.Callback):
    def on_train_start(self, trainer, stage) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_epochs_give_the_schedule_of_the_steps_that_they_have(teacher, kind):
    found = []
    for options in ({"max_steps": 6}, {"max_epochs": 3}, {"max_epochs": 3, "max_steps": 6}):
        seen = LearningRates()
        stage = make(kind, teacher, "gla", warmup=0.9)
        trainer(**options, accumulate_grad_batches=2, callbacks=seen).fit(stage, loader(teacher))
        found.append(seen.rates)
    assert found[0] == found[1] == found[2] and max(found[0]) > min(found[0]) > 0


@pytest.mark.parametrize(("options", "says"), [
    ({"max_time": "00:00:01:00"}, "kd: the learning rate needs a length of training: give the Trainer max_steps"),
    ({"max_epochs": -1}, "kd: the learning rate needs a length"),
    ({"max_steps": 99, "max_epochs": 1}, "kd: max_steps 99 is the length .* but max_epochs 1 ends after . steps: give one"),
    ({"max_steps": 1, "gradient_clip_val": 0.5}, "kd clips gradients itself: give it clip=0.5"),
    ({"max_steps": 1, "precision": "16-true"}, "kd: a student in torch.float16 .* bf16-mixed"),
    ({"max_steps": 1, "plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}, "16-mixed.* bf16-mixed"),
])  # fmt: skip
def test_a_trainer_that_a_stage_would_not_follow_is_refused(teacher, options, says):
    with pytest.raises(InputError, match=says):
        trainer(**options).fit(make(KDStage, teacher, "gla"), loader(teacher))


def test_matrix_mixing_in_bf16_is_refused_too(teacher):
    with pytest.raises(InputError, match="matrix_mixing: a student in torch.bfloat16 is not trained"):
        trainer(max_steps=1, precision="bf16-true").fit(make(MatrixMixingStage, teacher, "gla"), loader(teacher))


def test_held_out_losses_are_means_over_the_tokens_of_all_batches_and_loaders(teacher):
    batches = [some_tokens(teacher, rows=2, length=length) for length in (12, 3)]
    stage = make(KDStage, teacher, "gla")
    losses = [stage.validate(batch)["student_ce"].item() for batch in batches]
    for loaders in (DataLoader(batches, batch_size=None), [DataLoader([batch], batch_size=None) for batch in batches]):
        trainer().validate(stage, loaders, verbose=False)
        assert stage.validation["student_ce"] == pytest.approx((11 * losses[0] + 2 * losses[1]) / 13, rel=1e-5)


def test_the_values_of_an_epochs_last_step_are_means_of_its_micro_batches(teacher):
    stage, seen = make(KDStage, teacher, "gla", lr=1e-9), []
    keep = LambdaCallback(on_train_batch_end=lambda *args: seen.append(stage.values[0].item()))
    trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=keep).fit(stage, loader(teacher))  # four micro-batches
    losses = [stage.losses(batch, seed=0)[0].item() for batch in loader(teacher)]
    assert seen[2:] == pytest.approx([sum(losses[:3]) / 3, losses[3]], rel=1e-4)


def test_callbacks_may_monitor_what_is_validated(teacher):
    stage, stop = make(KDStage, teacher, "gla"), EarlyStopping("validation/student_ce", min_delta=100, patience=0)
    run = trainer(max_steps=8, val_check_interval=2, callbacks=stop)
    run.fit(stage, loader(teacher), loader(teacher))
    assert run.global_step == 4 and stage.validation["student_ce"] == run.callback_metrics["validation/student_ce"].item()


def test_lightnings_own_checkpoints_go_on_to_the_same_weights(teacher, tmp_path):
    found = []
    for resumed in (False, True):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        stage = make(MatrixMixingStage, teacher, "gla", lr=1e-2)
        run = trainer(max_steps=8, callbacks=save, enable_checkpointing=True)
        run.fit(stage, loader(teacher), ckpt_path=tmp_path / "step=4.ckpt" if resumed else None)
        found.append(stage.student.state_dict())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@pytest.mark.slow
def test_a_bf16_teacher_and_autocast_change_little(teacher, teacher_folder, tokens, name):
    """Compute losses as a GPU run does: student's weights in fp32, teacher's in bf16, autocast around both."""
    half = Teacher(str(teacher_folder), torch.bfloat16)
    matrix_mixing = [(MatrixMixingStage, {"estimator": estimator}) for estimator in ("exact", "probe")]
    student = StudentFactory(name, init="fresh").build(teacher, seed=0)
    for kind, options in [*matrix_mixing, (HiddenAlignStage, {}), (KDStage, {})]:
        exact, stage = (kind(student, model, **options) for model in (teacher, half))
        expected = loss_of(exact, tokens)
        student.zero_grad()
        stage.configure_model()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = stage.losses(tokens, seed=0)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=0.02)
        for key, parameter in stage.student.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("estimator", ["exact", "probe"])
def test_under_bf16_the_teacher_still_has_a_small_matrix_distance(teacher, tokens, estimator):
    distances = {}
    for init in ("qkv", "fresh"):
        stage = make(MatrixMixingStage, teacher, "softmax", init, estimator=estimator)
        with torch.autocast("cpu", torch.bfloat16):
            distances[init] = loss_of(stage, tokens)
    assert distances["qkv"] < 0.02 * distances["fresh"]
