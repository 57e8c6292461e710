"""DeepSpeed's JSON files: what they say is done, or refused in a line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from launching import ROOT, in_ten_thousand_tries
from todi.errors import InputError
from todi.runtime.device import Precision
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.deepspeed_keys import page
from todi.training.optimizer import build_optimizer, build_schedule, wrap
from torch import nn

# as published with MiniLLM, DistiLLM and what followed them
PUBLISHED = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "steps_per_print": 2000,
             "zero_allow_untested_optimizer": True, "wall_clock_breakdown": False,
             "zero_optimization": {"stage": 1, "allgather_partitions": True, "allgather_bucket_size": 5e8,
                                   "overlap_comm": False, "reduce_scatter": True, "reduce_bucket_size": 5e8,
                                   "contiguous_gradients": True},
             "bf16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 11, "loss_scale_window": 5000,
                      "hysteresis": 4, "min_loss_scale": 128}}


def build(folder, content, precision: str = "fp32", stage: int = 1, ranks: int = 1) -> dict:
    """The configuration for batches of 4 x 2 with a file."""
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return build_deepspeed_config(precision=Precision(precision, "test"), zero_stage=stage, batch_size=4,
                                  accumulation=2, clip_grad=1.0, ranks=ranks, override_file=str(file))


def of_settings(**settings) -> dict:
    """The configuration without a file."""
    return build_deepspeed_config(**{"precision": Precision("fp32", "test"), "zero_stage": 1, "batch_size": 4,
                                     "accumulation": 2, "clip_grad": 1.0} | settings)


class TestOffload:
    def test_what_is_named_lies_in_the_computers_memory(self):
        zero = of_settings(zero_stage=3, offload=("optimizer", "param"))["zero_optimization"]
        assert zero == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

    @pytest.mark.parametrize(("stage", "offload", "said"), [
        (0, ["optimizer"], "--offload: offload_optimizer needs ZeRO stage 1 or more, got 0"),
        (2, ["param"], "--offload: offload_param needs ZeRO stage 3 or more, got 2")])
    def test_a_stage_that_has_it_not(self, stage, offload, said):
        with pytest.raises(InputError, match=said):
            of_settings(zero_stage=stage, offload=offload)

    def test_a_file_wins(self, tmp_path):
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}')
        zero = of_settings(offload=["optimizer", "param"], override_file=str(file))["zero_optimization"]
        assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("none", "cpu")


def test_a_files_keys_win_and_its_autos_do_not(tmp_path):
    config = build(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
                              "gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": "auto"})
    assert config["zero_optimization"] == {"stage": 3}
    assert config["gradient_clipping"] == 0.5
    assert config["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("content", [
    {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
    {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}, "scheduler": "auto", "fp16": "auto"},
    {"zero_optimization": {"stage": "1", "overlap_comm": None, "offload_param": None, "cpu_offload": False}},
    {"amp": {"enabled": False}, "activation_checkpointing": {"partition_activations": False}, "aio": {}},
    {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "communication_data_type": None},
    {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "gradient_clipping": 1},
    '{\n  // mine\n  "zero_optimization": {"stage": 1},\n}'])
def test_what_agrees_changes_nothing(content, tmp_path):
    assert build(tmp_path, content, ranks=2) == build(tmp_path, {}, ranks=2)


def test_the_published_file(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "todi"):
        config = build(tmp_path, PUBLISHED, "bf16")
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert "bf16.loss_scale has no effect here" in caplog.text
    assert build(tmp_path, {"bfloat16": {"enabled": True}}, "bf16")["bf16"] == {"enabled": True}


def test_a_stage_that_would_train_differently(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "todi"):
        assert build(tmp_path, {"zero_optimization": {"stage": 0}}, "bf16")["zero_optimization"] == {"stage": 1}
    assert "ZeRO stage 1 in place of 0" in caplog.text
    assert build(tmp_path, {"zero_optimization": {"stage": 0}})["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(("content", "said"), [
    ({"train_micro_batch_size_per_gpu": 8}, "is 4, by --batch-size; the file says 8"),
    ({"train_batch_size": 32}, "train_batch_size is 8, by --batch-size, .* the file says 32"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is false, by --precision; the file says true"),
    ({"bfloat16": {"enabled": True}}, "bf16.enabled is false, by --precision"),
    ({"bf16": {"enabled": False}, "bfloat16": {"enabled": False}}, "more than once bf16"),
    ({"bf16": True}, r"bf16 must be an object, \{...\}, got true"),
    ({"zero_optimization": None}, "zero_optimization must be an object, .* got null"),
    ({"zero_optimization": True}, "zero_optimization must be an object"),
    ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage: Input should be 0, 1, 2, 3 or 3, got 5"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be a number, got true"),
    ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm must be true or false, got 1"),
    ({"zero_optimization": {"overlap_com": True}}, "no zero_optimization.overlap_com; did you mean overlap_comm"),
    ({"zero_optimisation": {"stage": 2}}, "there is no zero_optimisation; did you mean zero_optimization"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer must be an object"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, "did you mean device"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "use cpu"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
     "offload_param needs ZeRO stage 3 or more, got 2"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload true .* use offload_optimizer"),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients true is not supported"),
    ({"zero_optimization": {"load_from_fp32_weights": False}}, "load_from_fp32_weights false is not supported"),
    ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow false is not supported"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-6}}}, "optimizer has no effect here; .* --lr"),
    ({"optimizer": {"type": "OneBitAdam"}}, "optimizer has no effect here; it is AdamW"),
    ({"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}, "optimizer has no effect here"),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler has no effect here; use --lr-scheduler"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast has no effect here; use --precision"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size has no effect here"),
    ({"activation_checkpointing": {"partition_activations": True}}, "use --gradient-checkpointing"),
    ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint has no effect here; use --save-state-every"),
    ({"datastates": {"enabled": True}}, "datastates has no effect here"),
    ({"communication_data_type": "fp16"}, "gradients travel in the type of --precision"),
    ({"gradient_clipping": None}, "gradient_clipping must be a number of at least 0, got null"),
    ({"gradient_clipping": True}, "gradient_clipping must be a number"),
    ({"steps_per_print": 0}, "steps_per_print must be a whole number of at least 1, got 0"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer must be false"),
    ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "more than once zero_optimization"),
    ("{", "Bad key name"), ("[]", r"expected an object, got \[\]"), ("[" * 100_000, "recursion")])
def test_what_a_file_may_not_say(content, said, tmp_path):
    with pytest.raises(InputError, match=said) as refused:
        build(tmp_path, content)
    assert all(len(problem.splitlines()) == 1 for problem in refused.value.problems)


def test_the_page_of_keys_is_up_to_date():
    made = (ROOT / "docs" / "deepspeed.md").read_text()
    assert made == page(), "python -m todi.training.deepspeed_keys > docs/deepspeed.md"


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(InputError) as refused:
        build(tmp_path, {"amp": True, "zero_optimization": {"stage": 7, "x": 1}, "gradient_clipping": -1})
    assert len(refused.value.problems) == 4


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = st.sampled_from([0, 1, 7, 1000, 5e8, 2**62, -1, 0.5, "auto", "5e8", None, True, 1e30])
BOOLS = st.sampled_from([True, False, "auto", None, "true", 1])
SCALES = {"enabled": BOOLS, "loss_scale": SIZES, "initial_scale_power": SIZES, "loss_scale_window": SIZES,
          "hysteresis": SIZES, "min_loss_scale": SIZES}
OFFLOAD = st.one_of(st.none(), st.just("cpu"), st.just("auto"), st.fixed_dictionaries({}, optional={
    "device": st.sampled_from(["cpu", "none", "nvme", "gpu", None]), "pin_memory": BOOLS, "buffer_count": SIZES,
    "ratio": st.sampled_from([1.0, 0.5, 2]), "nvme_path": st.sampled_from(["/tmp", None, 1]), "fast_init": BOOLS}))
ZERO = {"stage": st.sampled_from([0, 1, 2, 3, 2, 3, 4, "2", None, True, 1.5]), "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD, "zero_quantised": BOOLS} | dict.fromkeys(
    ["reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
     "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
     "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size"], SIZES) | \
    dict.fromkeys(["contiguous_gradients", "reduce_scatter", "overlap_comm", "allgather_partitions", "cpu_offload",
                   "use_multi_rank_bucket_allreduce", "round_robin_gradients", "memory_efficient_linear",
                   "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "legacy_stage1",
                   "stage3_gather_16bit_weights_on_model_save", "zero_quantized_weights", "compute_grad_norm"], BOOLS)


def a_few_of(keys: dict, most: int) -> st.SearchStrategy:
    """Objects with up to so many of the keys."""
    return st.lists(st.sampled_from(sorted(keys)), max_size=most, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({key: keys[key] for key in chosen}))


FILES = a_few_of({
    "zero_optimization": a_few_of(ZERO, 4), "bf16": a_few_of(SCALES | {"immediate_grad_update": BOOLS}, 2),
    "fp16": a_few_of(SCALES, 3), "gradient_clipping": SIZES, "steps_per_print": SIZES,
    "memory_breakdown": st.sampled_from([False, "auto", None, 1]), "wall_clock_breakdown": BOOLS,
    "train_batch_size": st.sampled_from([8, 16, "auto", None]), "amp": BOOLS,
    "gradient_accumulation_steps": SIZES, "optimizer": st.sampled_from([None, {"type": "AdamW"}, {"type": "SGD"}]),
    "data_types": st.sampled_from([{}, {"grad_accum_dtype": "fp32"}]), "prescale_gradients": BOOLS}, 3).flatmap(
    lambda file: st.builds(lambda zero: {"zero_optimization": zero} | file, a_few_of(ZERO, 4)))


def train_a_step(config: dict) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 20))
    enabled = [dtype for name, dtype in HALVES.items() if config[name]["enabled"]]
    model.to(enabled[0] if enabled else torch.float32)
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                                clip_grad=config["gradient_clipping"], stage=config["zero_optimization"]["stage"])
    schedule = build_schedule(optimizer, "cosine", total_steps=9, warmup_steps=0, lr=1e-2, lr_min=0)
    engine = wrap(model, optimizer, schedule, config)
    for _ in range(2 * config["gradient_accumulation_steps"]):
        ids = torch.arange(4)
        engine.backward(nn.functional.cross_entropy(engine(ids).float(), ids), scale_wrt_gas=False)
        engine.step()
    if engine.fp16_enabled() and not engine.was_step_applied():
        return  # the loss scale was too high at first, and is lowered
    assert engine.was_step_applied() and float(engine.get_global_grad_norm()) > 0


def try_files(folder: Path, examples: int, first: int = 0) -> int:
    """Trains a step with each file that is accepted; how many were."""
    accepted = 0

    @seed(first)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(FILES, st.sampled_from(["fp32", *HALVES]), st.integers(0, 3))
    def attempt(file: dict, precision: str, stage: int) -> None:
        nonlocal accepted
        try:
            config = build(folder, file, precision, stage)
        except InputError as refused:
            assert all(len(problem.splitlines()) == 1 for problem in refused.problems)
            return
        accepted += 1
        DeepSpeedConfig(config)
        train_a_step(config)

    attempt()
    return accepted


def test_what_is_accepted_trains(tmp_path, process_group):
    assert try_files(tmp_path, 300) > 30


@in_ten_thousand_tries
def test_what_is_accepted_trains_in_ten_thousand_tries(first, tmp_path):
    """A thousand at a time in a process of its own: DeepSpeed keeps what an engine held."""
    work = ("import pathlib, sys, torch, test_deepspeed_files as test\n"
            "from deepspeed.accelerator import get_accelerator\n"
            "from todi.runtime.distributed import process_group, world_from_environment\n"
            "type(get_accelerator()).is_fp16_supported = lambda accelerator: True\n"
            "with process_group(world_from_environment(), torch.device('cpu')):\n"
            f"    assert test.try_files(pathlib.Path({str(tmp_path)!r}), 1000, first={first}) > 100")
    paths = f"{ROOT / 'code'}:{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", work], env=os.environ | {"PYTHONPATH": paths}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
