"""Each file of scripts/accelerate_configs configures what its name says, is in the README, and launches.

Processes communicate by gloo on CPU. FSDP needs a GPU to be reported, see `as_on_gpus.py`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers.programs import run_launcher
from helpers.scripts import (
    SCRIPTS,
    is_encoder_matrix,
    read_json,
    sentiment_rows,
    train_args,
    write_rows,
    zero_fraction,
)
from transformers import AutoModelForSequenceClassification


CONFIGS = {path.stem: path for path in sorted((SCRIPTS / "accelerate_configs").glob("*.yaml"))}
PAGE = (SCRIPTS.parent / "docs" / "howto" / "processes.md").read_text()
DEEPSPEED = [name for name in CONFIGS if name.startswith("zero")]
FSDP = [name for name in CONFIGS if name.startswith("fsdp2")]


def launcher(name, *more):
    """Returns the arguments that `accelerate launch` parses."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), *more, "run_glue.py"])
    return _validate_launch_command(args)[0]


def test_there_is_one_for_each_mode_and_the_docs_name_it():
    assert set(CONFIGS) == {"ddp", "fsdp2", "fsdp2_sharded", "zero1", "zero2", "zero3"}
    assert not [name for name in CONFIGS if f"`{name}.yaml`" not in PAGE]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_one_that_accelerate_knows(name):
    config, known = load_config_from_file(str(CONFIGS[name])), vars(launcher(name))
    sections = config.fsdp_config.keys() | config.deepspeed_config.keys()
    assert sections <= known.keys() and bool(sections) == (name != "ddp")
    assert launcher(name).num_processes == 2
    assert launcher(name, "--num_processes", "4").num_processes == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_it_turns_on_what_its_name_says(name):
    args = launcher(name)
    assert [args.multi_gpu, args.use_fsdp, args.use_deepspeed] == [name == "ddp", name in FSDP, name in DEEPSPEED]
    assert args.mixed_precision == "no"  # the training arguments say bf16 or fp16


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_is_version_2_and_wraps_the_layers_that_are_named(name):
    for given, layers in (((), ["BertLayer"]), (("--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"), ["GPT2Block"])):
        with patch_environment(**prepare_multi_gpu_env(launcher(name, *given))):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.transformer_cls_names_to_wrap == layers
        sharded = "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
        assert sharded == (name == "fsdp2_sharded")


@pytest.mark.parametrize("name", DEEPSPEED)
def test_zero_is_of_its_stage_and_takes_the_rest_from_the_training_arguments(name):
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin

    args = launcher(name)
    args.deepspeed_fields_from_accelerate_config = ""
    with patch_environment(**prepare_deepspeed_cmd_env(args)[1]):
        config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == int(name[-1])
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (name == "zero3")
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


# What only that mode leaves in a checkpoint of two processes.
SIGNS = {
    "ddp": ["pruning_state.safetensors", "rng_state_1.pth", "optimizer.pt"],
    "fsdp2": ["pruning_state-00002-of-00002.safetensors", "model.safetensors", "optimizer.bin"],
    "fsdp2_sharded": ["pruning_state-00002-of-00002.safetensors", "pytorch_model_fsdp_0/.metadata"],
    "zero1": ["pruning_state-00002-of-00002.safetensors", "global_step8/mp_rank_00_model_states.pt"],
    "zero2": ["pruning_state-00002-of-00002.safetensors", "global_step8/mp_rank_00_model_states.pt"],
    "zero3": ["pruning_state-00002-of-00002.safetensors", "global_step8/zero_pp_rank_1_mp_rank_00_model_states.pt"],
}


def launch(name, tiny_bert, folder, *more) -> Path:
    """Runs run_glue.py on two processes, in eight steps."""
    train = write_rows(folder / "train.csv", sentiment_rows(24))
    out = folder / "out"
    script = [str(SCRIPTS / "run_glue.py")]
    if name != "ddp":
        script.insert(0, str(Path(__file__).with_name("as_on_gpus.py")))
    options = train_args(out, max_steps=8, save_strategy="steps", save_steps=8, target_sparsity=0.5)
    options += ["--model_name_or_path", tiny_bert, "--task_name", "sst2", "--train_file", train, "--do_train"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name])]
    environment = {"PYTHONPATH": str(SCRIPTS.parent), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command += ["--main_process_port", "0", *script, *options, "--max_seq_length", "16", *more]
    done = run_launcher(command, os.environ | environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    assert "was requested, but" not in done.stderr + done.stdout
    return out


# Each takes three processes that import torch: for every day one of a family, and ddp.yaml as a command of the README.
EVERY_DAY = ("fsdp2", "zero3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in EVERY_DAY)) for name in CONFIGS]
)
def test_it_launches_and_prunes_to_the_target(name, tiny_bert, tmp_path):
    if name in DEEPSPEED:
        pytest.importorskip("deepspeed")
    out = launch(name, tiny_bert, tmp_path)
    missing = [sign for sign in SIGNS[name] if not (out / "checkpoint-8" / sign).is_file()]
    assert not missing, sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    state = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    zeros, total = zero_fraction(state, is_encoder_matrix)
    assert zeros == total // 2 == read_json(out / "pruning_report.json")["selected_zeros"]
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_final_model_is_smaller(name, tiny_bert, tmp_path):
    if name in DEEPSPEED:
        pytest.importorskip("deepspeed")
    out = launch(name, tiny_bert, tmp_path, "--pattern", "neuron", "--shrink")
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert model.config.intermediate_size == 16 and not any(info.values())
    assert "- intermediate_size, from 32 to 16:" in (out / "README.md").read_text()
    assert not (out / "checkpoint-8" / "pruning_shrink.json").exists()  # it has all 32 neurons
