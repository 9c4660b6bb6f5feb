"""The shape of the schedules, and what decays."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill_pl.stages.optim import adamw, clip_inside_step, linear, warmup_stable_decay

STEPS = [1, 2, 7, 10, 100, 999]


def rising(values: list[float]) -> bool:
    return all(a <= b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("warmup", "decay"), [(0.1, 0.1), (0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0)])
def test_warmup_stable_decay(steps, warmup, decay):
    shares = [warmup_stable_decay(step, steps, warmup, decay) for step in range(steps)]
    assert shares[0] > 0
    assert max(shares) == 1
    assert min(shares) > 0
    peak = [step for step, share in enumerate(shares) if share == 1]
    assert peak == list(range(peak[0], peak[-1] + 1))
    assert rising(shares[: peak[0] + 1])
    assert rising(shares[peak[-1] :][::-1])
    # level for what is left of the steps, give or take the two corners
    assert abs(len(peak) - (1 - warmup - decay) * steps) <= 2
    if decay and steps > 1:
        assert shares[-1] == pytest.approx(min(1, 1 / (steps * decay)))
    if warmup:
        assert shares[0] == pytest.approx(min(1, 1 / (steps * warmup)))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_linear(steps, warmup):
    shares = [linear(step, steps, warmup) for step in range(steps)]
    assert shares[0] > 0
    assert min(shares) > 0
    assert max(shares) == 1
    peak = shares.index(1)
    assert rising(shares[: peak + 1])
    assert rising(shares[peak:][::-1])
    assert abs(peak - warmup * steps) <= 1
    if warmup < 1 and steps >= 100:
        assert shares[-1] <= 1 / (steps * (1 - warmup)) + 1e-9
        falls = [a - b for a, b in zip(shares[peak + 1 :], shares[peak + 2 :], strict=False)]
        assert max(falls) == pytest.approx(min(falls), abs=1e-9)  # in a line
        assert max(falls) == pytest.approx(1 / (steps * (1 - warmup)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay():
    network = model()
    network[0].requires_grad_(False)
    optimizer = adamw(network.parameters(), lr=0.1, weight_decay=0.3)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(id(p) for p in trained)
    for parameter in trained:
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.3 if parameter.ndim == 2 else 0)
        assert (group["lr"], group["betas"]) == (0.1, (0.9, 0.95))


def test_parameters_may_learn_at_a_share_of_the_rate():
    network = model()
    first = {id(p) for p in network[1].parameters()}
    optimizer = adamw(network.parameters(), 0.1, 0.3, lambda parameter: 1.0 if id(parameter) in first else 0.25)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter in network.parameters():
        assert found[id(parameter)]["lr"] == (0.1 if id(parameter) in first else 0.025)
        assert found[id(parameter)]["weight_decay"] == (0.3 if parameter.ndim == 2 else 0)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_norms_and_biases_stay_where_nothing_pulls_at_them():
    network = model()
    start = [p.clone() for p in network.parameters()]
    optimizer = adamw(network.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, before in zip(network.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, before * (0.95 if parameter.ndim == 2 else 1))


def test_a_model_of_vectors_alone_has_one_group():
    optimizer = adamw(nn.LayerNorm(3).parameters(), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0]


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def maybe_sharded(request) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Return a function that leaves a network as it is, or one that shards it by FSDP over this process alone."""
    if not request.param:
        yield lambda network: network
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield lambda network: fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("finite", [True, False])
def test_clip_inside_step_is_what_fused_adamw_reads(finite, maybe_sharded):
    """torch documents neither `grad_scale` nor `found_inf`: a version that stops reading them fails here."""
    networks = maybe_sharded(model()), maybe_sharded(model())
    fused, plain = (
        torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
        for network, fused in zip(networks, (True, False), strict=True)
    )
    for network in networks:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
    start = [p.clone() for p in networks[0].parameters()]
    norm = torch.nn.utils.get_total_norm([p.grad for p in networks[0].parameters()])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_inside_step(fused, norm, 0.01, torch.tensor(finite))
    fused.step()
    if not finite:
        assert all(torch.equal(p, before) for p, before in zip(networks[0].parameters(), start, strict=True))
        return
    torch.nn.utils.clip_grad_norm_(networks[1].parameters(), 0.01)
    plain.step()
    for parameter, expected in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(parameter, expected)
        torch.testing.assert_close(parameter.grad, expected.grad)
