"""Name the private interfaces of other libraries that this package uses: a version that changes one fails here.

Those of torch's compiler and of lm-eval have tests beside the modules that use them.
"""

import inspect

import pytest
import torch
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlamaForCausalLM, PreTrainedModel, initialization

# ---- Lightning, argparse and jsonargparse: distill_pl/cli.py


@pytest.mark.parametrize(
    ("name", "parameters", "caller"),
    [
        ("_add_subcommands", ["self", "parser", "kwargs"], LightningCLI.setup_parser),
        ("_set_seed", ["self"], LightningCLI.__init__),
        ("_run_subcommand", ["self", "subcommand"], LightningCLI.__init__),
    ],
)
def test_methods_that_lightning_cli_calls(name, parameters, caller):
    assert list(inspect.signature(getattr(LightningCLI, name)).parameters) == parameters
    assert f"self.{name}(" in inspect.getsource(caller)


def test_actions_of_a_parser():
    parser = LightningArgumentParser()
    assert isinstance(parser, ArgumentParser)
    parser.add_function_arguments(lambda key=1: key, "group")
    action = next(action for action in parser._actions if action.dest == "group.key")
    action.help = "computed text"
    assert "computed text" in parser.format_help()


def test_meta_keys_of_a_namespace():
    assert Namespace(__default_config__="file", key=1).clone(with_meta=False) == Namespace(key=1)


# ---- transformers: distill_pl/student/modeling.py


def test_is_hf_initialized():
    marked, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    marked._is_hf_initialized = True
    for parameter in (marked, other):
        initialization.zeros_(parameter)
    assert marked.tolist() == [1, 1] and other.tolist() == [0, 0]


def test_no_split_modules(teacher):
    assert "LlamaDecoderLayer" in teacher.model.model._no_split_modules
    assert "self._no_split_modules" in inspect.getsource(PreTrainedModel.post_init)


def test_tied_weights_keys():
    assert hasattr(PreTrainedModel, "_tied_weights_keys")
    assert LlamaForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


# ---- transformers: distill_pl/teacher.py


def test_attn_implementation(teacher):
    config = transformers.AutoConfig.from_pretrained(teacher.path)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


# ---- torch: distill_pl/student/cache.py and others


def test_pytree():
    tree = (torch.ones(1), {"tail": torch.ones(1)}, None)
    first, tails, nothing = tree_map(lambda x: x + 1 if x is not None else None, tree)
    assert first == 2 and tails["tail"] == 2 and nothing is None
    assert [type(x) for x in tree_leaves(tree)] == [torch.Tensor, torch.Tensor, type(None)]


# ---- Lightning: distill_pl/stages/sharding.py


def test_sizes_of_model_parallel_strategy():
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in source and "self._tensor_parallel_size" in source
