"""A new mixer costs one file, here this one, and one line in MIXERS; everything else picks it up."""

import inspect
from typing import NamedTuple

import pytest
import torch
from mixers import test_mixers
from mixers.conftest import fresh  # noqa: F401 (a fixture of the contract's tests)
from op_inputs import families
from ops import test_laws
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, initialization

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.exports.fla import as_fla
from distill_pl.exports.native import as_native
from distill_pl.measure import params
from distill_pl.mixers import MIXERS, SequenceMixer
from distill_pl.ops import promoted
from distill_pl.student.factory import StudentFactory

NAME = "moving_average"


class moving_average:  # noqa: N801 (it stands for a module of distill_pl.ops)
    """Linear attention over an exponential moving average.

    S_t = a S_{t-1} + (1 - a) k_t v_t^T, y_t = scale * S_t^T q_t;  A_ij = scale * (q_i . k_j) (1 - a) a^{i-j};  a = e^decay
    """

    class Inputs(NamedTuple):
        """Hold the arguments of `mix` for a sequence, or without T those of `step` for a token."""

        q: Tensor  # [B, T, H, K]
        k: Tensor  # [B, T, H, K]
        v: Tensor  # [B, T, H, V]
        decay: Tensor  # [B, T, H]: log a <= 0
        scale: float

    @staticmethod
    def matrix(q: Tensor, k: Tensor, decay: Tensor, scale: float) -> Tensor:
        """Build A [B, H, T, T] in fp32 (float64 stays)."""
        with torch.autocast(q.device.type, enabled=False):
            q, k, decay = (x.transpose(1, 2) for x in promoted(q, k, decay[..., None]))
            powers = decay.expand(-1, -1, -1, q.shape[2]).tril(-1).cumsum(-2)
            return (q * scale @ (k * -decay.expm1()).mT) * powers.exp().tril()

    @staticmethod
    def mix(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float,
            state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mix a sequence token by token -> y [B, T, H, V] in the dtype of v, state [B, H, K, V] in fp32 (float64 stays)."""
        outputs = []
        for time in range(v.shape[1]):
            y, state = moving_average.step(q[:, time], k[:, time], v[:, time], decay[:, time], scale, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    @staticmethod
    def step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float,
             state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Apply the recurrence -> y [B, H, V] in the dtype of v, state [B, H, K, V] in fp32 (float64 stays)."""
        dtype = v.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, decay = promoted(q, k, v, decay[..., None, None])
            added = -decay.expm1() * k[..., :, None] * v[..., None, :]
            state = added if state is None else decay.exp() * state + added
            return (torch.einsum("bhk,bhkv->bhv", q, state) * scale).to(dtype), state


class MovingAverage(SequenceMixer):
    """The mixer of `moving_average`, with one learned decay a head."""

    op = moving_average

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.decay_logit = nn.Parameter(torch.zeros(self.heads))

    def start(self, config) -> None:
        """Set every decay to `config.retention`."""
        initialization.constant_(self.decay_logit, torch.logit(torch.tensor(config.retention)).item())

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k, v and the log decay; a padded token has log decay 0: it writes nothing."""
        q, k, v = self.qkv(hidden, position)
        decay = logsigmoid(self.decay_logit.float()).expand(*hidden.shape[:2], -1)
        if mask is not None:
            decay = decay * mask[:, :, None]
        return moving_average.Inputs(q, self.repeat_kv(k), self.repeat_kv(v), decay, self.scale), hidden


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Add the line to MIXERS while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXERS, NAME, MovingAverage)
        yield


# ---- the laws of ops and the contract of mixers: the tests of all others, collected here again with these fixtures


@pytest.fixture
def family() -> str:
    return NAME


@pytest.fixture
def name() -> str:
    return NAME


for module, fixture in [(test_laws, "family"), (test_mixers, "name")]:
    for test_name, test in vars(module).items():
        if test_name.startswith("test_") and fixture in inspect.signature(test).parameters and test_name not in globals():
            if not any(mark.name == "parametrize" and fixture in mark.args[0] for mark in getattr(test, "pytestmark", [])):
                globals()[test_name] = test


def test_its_op_is_a_family_of_the_laws():
    assert families()[NAME][0] is moving_average
    assert {"test_matrix_times_v_is_mix_is_step_by_step", "test_forward_is_the_output_of_matrix_times_v"} <= globals().keys()


# ---- the commands


@pytest.fixture(scope="module")
def run(registered, fitted):
    """Run all three stages, of a step each."""
    return fitted(**{"student.mixer": NAME, "tokens": 384, "matrix_mixing.tokens": 128, "hidden_align.tokens": 128})


@pytest.mark.slow
def test_exported_student_generates_the_same_with_and_without_a_cache(run):
    model, tokenizer = (auto.from_pretrained(run / "student") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert all(type(mixer) is MovingAverage for mixer in model.mixers)
    prompt = tokenizer(["Story 1. A fox sees"], return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**prompt, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convert", [as_fla, as_native])
def test_no_other_class_is_known_to_compute_it(teacher, convert):
    with pytest.raises(InputError, match="no class is known that computes the same"):
        convert(StudentFactory(NAME).build(teacher, seed=0))


@pytest.fixture
def two_layers(monkeypatch):
    """Let `distill-pl params` count the students of a SmolLM with 2 layers instead of 32, which takes seconds less."""
    smollm = params.smollm_360m()
    smollm.config.num_hidden_layers = 2
    monkeypatch.setattr(params, "smollm_360m", lambda: smollm)


@pytest.mark.slow
@pytest.mark.usefixtures("two_layers")
def test_report_names_it(run, tmp_path):
    main(["report", str(run), f"--out={tmp_path}"])
    assert f"{NAME}_qkv_mm_h2h" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("two_layers")
def test_params_counts_it(capsys):
    main(["params"])
    assert NAME in capsys.readouterr().out


def test_help_lists_it(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--help"])
    assert exit.value.code == 0
    assert NAME in capsys.readouterr().out
