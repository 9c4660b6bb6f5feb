"""The calibrated start: set gates, decays and output projections of a student layer by layer, without a training step.

A student that copies q, k, v and o still starts far from its teacher, because what surrounds the copied projections undoes
them: random gates are nearly closed, all layers forget at one speed, norms change scales. For each layer in turn, with the
student's own hidden states as input, the settings are kept with which a linear map of what o_proj reads, the mixer's features,
leaves least of the teacher's attention output unexplained; then o_proj becomes that map, by ridge regression:

    W = argmin_W  sum_t |W f_t - a_t|^2 + lambda |W|^2

with f_t the features and a_t the output of the teacher's attention, after its o_proj, at token t. Settings, lambda and W are
judged on sequences that W was not fitted to, and nothing is kept that does not lower the error there.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill_pl.mixers import SequenceMixer
from distill_pl.mixers.mixer import Position
from distill_pl.mixers.short_conv import ShortConv
from distill_pl.student.modeling import Student, StudentConfig
from distill_pl.teacher import Teacher

TOKENS = 2**17  # read by a calibrated start
ROWS = 16  # sequences in a forward pass
HELD_OUT = 4  # one sequence of so many judges
RETENTIONS = (0.6, 0.9, 0.996)  # tried beside student.retention
OPEN_GATE = 2.0  # to which the output gate's projection is held
WRITING = (-2.0, 2.0)  # logits to which beta is held: little or much of a token is written
NARROW = 0.25  # factor of short convolutions, within which silu is nearly linear
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # lambda, as shares of the features' mean square
GAIN = 1e-3  # of the error, below which nothing is changed
TINY = 1e-30


class Products:
    """Sums of products, in float64, of what a layer's o_proj reads, F [tokens, H V], and should write, A [tokens, D]."""

    def __init__(self) -> None:
        self.features: Any = 0.0  # F^T F
        self.both: Any = 0.0  # F^T A
        self.target = 0.0  # |A|^2

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add some tokens: features [..., H V], target [..., D]."""
        f, a = (x.flatten(0, -2).double() for x in (features, target))
        self.features, self.both = self.features + f.mT @ f, self.both + f.mT @ a
        self.target += a.square().sum().item()

    def solve(self, ridge: float) -> Tensor:
        """Solve the ridge regression -> W [D, H V], float64."""
        penalty = ridge * self.features.diagonal().mean() + TINY
        return torch.linalg.solve(self.features + penalty * torch.eye(len(self.features)).to(self.features), self.both).mT

    def error(self, weight: Tensor) -> float:
        """Compute |F W^T - A|^2 / |A|^2 for W [D, H V]."""
        w = weight.double()
        return ((w @ self.features * w).sum() - 2 * (w * self.both.mT).sum()).item() / max(self.target, TINY) + 1


@torch.no_grad()
def calibrate(student: Student, teacher: Teacher, tokens: Tensor) -> Iterator[tuple[float, float]]:
    """Calibrate a student in place from tokens [N, T] -> for each layer the error on held-out sequences, before and after.

    The error is the share of the teacher's attention output that the mixer's does not explain, |W f - a|^2 / |a|^2. Student and
    teacher must be on one device, where they stay. Equal arguments give equal weights.
    """
    was_training, batches = student.training, tokens.to(student.device).split(ROWS)
    precision = teacher.model.dtype  # the student computes in it too, as it does in training
    autocast = torch.autocast(student.device.type, precision, enabled=precision != torch.float32)
    student.eval()
    states = [student.model.embed_tokens(batch) for batch in batches]
    for index, layers in enumerate(zip(*(teacher.layers(batch, with_mixed=True) for batch in batches), strict=True)):
        targets, block = [layer.mixed for layer in layers], student.model.layers[index]
        with autocast:
            hidden, position = [block.input_layernorm(state) for state in states], student.position(states[0])
            errors = fit_mixer(block.self_attn, student.config, hidden, position, targets)
            states = [block(state, position_embeddings=position) for state in states]
        yield errors
    student.train(was_training)


def fit_mixer(mixer: Any, config: StudentConfig, hidden: list[Tensor], position: Position,
              targets: list[Any]) -> tuple[float, float]:  # fmt: skip
    """Choose a mixer's settings, then its o_proj, for batches of what it reads and should write, [N, T, D] each.

    Returns its error before and after.
    """

    def measured() -> tuple[float, float, Tensor]:
        """Return the error of o_proj as it is, the least error, and the weight that has it."""
        fitted, judging, bias = Products(), Products(), mixer.o_proj.bias
        for reads, target in zip(hidden, targets, strict=True):
            features, writes = features_of(mixer, reads, position), target if bias is None else target - bias
            judging.add(features[::HELD_OUT], writes[::HELD_OUT])
            for first in range(1, HELD_OUT):
                fitted.add(features[first::HELD_OUT], writes[first::HELD_OUT])
        own = mixer.o_proj.weight
        errors = [(judging.error(weight), weight) for weight in map(fitted.solve, RIDGES)]
        least, weight = min(errors, key=lambda pair: pair[0])
        before = judging.error(own)
        return (before, least, weight) if least < before - GAIN else (before, before, own)

    before, least, weight = measured()
    kept = copy.deepcopy(mixer.state_dict())
    for change in changes(mixer, config, constant_reader(hidden)):
        change()
        _, error, other = measured()
        if error < least - GAIN:
            least, weight, kept = error, other, copy.deepcopy(mixer.state_dict())
        mixer.load_state_dict(kept)
    mixer.o_proj.weight.copy_(weight)
    return before, least


def features_of(mixer: SequenceMixer, hidden: Tensor, position: Position) -> Tensor:
    """Run a mixer on hidden [N, T, D] -> what its o_proj reads [N, T, H V]."""
    read: list[Tensor] = []
    hook = mixer.o_proj.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    mixer(hidden, position)
    hook.remove()
    return read[0]


def constant_reader(hidden: list[Tensor]) -> Tensor:
    """Find w [D] with w . x close to 1 for all x of hidden [N, T, D]: hidden states of language models share a direction."""
    products = Products()
    for x in hidden:
        products.add(x, x.new_ones(*x.shape[:-1], 1))
    return products.solve(RIDGES[0])[0].to(hidden[0])


def changes(mixer: Any, config: StudentConfig, reader: Tensor) -> Iterator[Callable[[], object]]:
    """List the settings to try, as functions that change a mixer: `reader` is what `constant_reader` found."""
    convolutions = [module for module in mixer.modules() if isinstance(module, ShortConv)]
    if convolutions:
        yield lambda: [module.weight.mul_(NARROW) for module in convolutions]
    if hasattr(mixer, "gate_proj"):
        yield lambda: hold(mixer.gate_proj, OPEN_GATE, reader)
    for logit in WRITING if hasattr(mixer, "beta_proj") else ():
        yield lambda logit=logit: hold(mixer.beta_proj, logit, reader)  # type: ignore[misc]
    for values in filter(None, (values_for(mixer, config, retention) for retention in RETENTIONS)):
        yield lambda values=values: mixer.load_state_dict(mixer.state_dict() | values)  # type: ignore[misc]


def hold(projection: Any, value: float, reader: Tensor) -> None:
    """Set a Linear, or a Sequential of them and activations, so that it returns about `value` for every hidden state."""
    modules: list[Any] = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    first, *others = modules
    first.weight.copy_(reader.expand_as(first.weight))
    if not others:
        first.weight.mul_(value)
        if first.bias is not None:
            first.bias.zero_()
        return
    *activations, last = others
    inner = torch.ones(1, last.in_features).to(reader)
    for activation in activations:
        inner = activation(inner)
    last.weight.fill_(value / inner.sum().item())


def values_for(mixer: SequenceMixer, config: StudentConfig, retention: float) -> dict[str, Tensor]:
    """Return, by name, the start values that another `student.retention` would change."""
    started = []
    for share in (config.retention, retention):
        changed, other = copy.copy(config), copy.deepcopy(mixer)
        changed.retention = share
        other.start(changed)
        started.append(other.state_dict())
    usual, wanted = started
    return {name: tensor for name, tensor in wanted.items() if not usual[name].equal(tensor)}
