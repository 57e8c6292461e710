"""Variables and options of the published scripts that have no meaning here, and what to use instead."""

from collections.abc import Mapping

# Of the launchers.
PUBLISHED = {
    "BASE_PATH": "paths start at the root of the repository",
    "WORK_DIR": "paths start at the root of the repository",
    "TASK": "each launcher has its own: sft_*.sh, vanilla_kd_*.sh",
    "CONFIG": "the folder of a run is named by its settings; SAVE_DIR gives it another name",
    "SETTING": "the folder of a run is named by its settings; SAVE_DIR gives it another name",
    "OPTS": "words after the launcher's name go to the Python command",
}


def _by_option(*tables: Mapping[str, str]) -> dict[str, str]:
    return {f"--{name}": said for table in tables for said, names in table.items() for name in names.split()}


_COMMON = {
    "leave it out: paths start where the command runs": "base-path",
    "leave it out: the model's own folder says it": "ckpt-name",
    "leave it out: torchrun says it": "n-gpu n-nodes local_rank",
    "leave it out: the command is the task": "task do-train do-valid do-eval",
    "leave it out: data are read as they are, by one process": "num-workers data-process-workers json-data bin-data "
                                                               "txt-data force-process force-process-demo only-prompt",
    "leave it out: the log says how far it is": "eval-tqdm",
    "use --precision": "fp32 model-dtype attn-dtype",
    "use --model-path": "load",
}
# Of todi.train.
TRAINING_OPTIONS = _by_option(_COMMON, {
    "use --kd-params alpha=0.5": "adaptive-kl-alpha",
    "use --kd-params skew_lambda=0.1": "skew-lambda",
    "use --kd-temperature, which is that of both": "teacher-temperature",
    "use --kd-temperature for the divergence; dev responses are drawn at 1": "temperature",
    "use --lr-scheduler": "lr-decay-style scheduler-name",
    "use --num-epochs or --max-steps": "total-iters training-epochs train-iters-per-epoch",
    "leave it out: a schedule ends with the run": "lr-decay-iters",
    "use --teacher-dtype": "teacher-model-fp16",
    "use --zero-stage 3": "model-parallel model-parallel-size",
    "use --seed, of which all random numbers follow": "seed-order seed-data seed-ppo seed-lm",
    "use --train-num": "train-ratio",
    "use --dev-num": "dev-ratio gen-num",
    "use --data-dir": "data-names processed-data-dir prompt-data-dir pretrain-data-dir",
    "use --peft-path": "peft-name",
    "use --teacher-peft-path": "teacher-peft-name",
    "use --save-dir": "save-additional-suffix",
    "use --eval-interval (checkpoints) or --save-state-every (what a run goes on from)": "save-interval",
    "use a file of DeepSpeed's (--deepspeed_config): fp16.loss_scale": "loss-scale",
    "leave it out: DeepSpeed is always used": "deepspeed deepscale",
    "leave it out: dev responses are drawn from all tokens at temperature 1; python -m todi.evaluate has it":
        "do-sample top-k top-p num-beams no-repeat-ngram-size repetition-penalty",
})
# Of todi.evaluate.
EVALUATION_OPTIONS = _by_option(_COMMON, {
    "use --seeds": "seed",
    "use --sets": "data-names",
    "use --limit": "dev-num",
    "use --batch-size": "eval-batch-size",
    "use --peft-path alone": "peft peft-name",
    "use --max-new-tokens": "gen-num",
    "leave it out: the model's configuration says it": "model-type",
    "use --precision: an evaluation runs without DeepSpeed": "deepspeed deepscale deepspeed_config",
})
