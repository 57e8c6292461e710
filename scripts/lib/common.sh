# What all launchers share. Source it, set the defaults that differ, call sft, distil or evaluate.
#
# Every setting is an environment variable: what is set outside wins over a launcher's `default`, which wins over
# the ones in this file. Words after the launcher's name go to the Python command as they are.
#   DRY_RUN=1     print the command and stop
#   DOCTOR=1      check all input, estimate memory and disk space, and stop
#   GPUS=0,1      devices to use; all that are visible when not given; GPUS=cpu for none
#   NPROC=2       processes on a CPU (gloo); 1 when not given
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes, as in torchrun

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# default NAME VALUE: gives the variable its value unless it has one.
default() { [[ -n ${!1:-} ]] || printf -v "$1" '%s' "$2"; }

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

if [[ -z ${PYTHON:-} ]]; then
  if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=$(command -v python3 || echo python); fi
fi
export PYTHONPATH=$ROOT/code${PYTHONPATH:+:$PYTHONPATH}

# ---- devices

choose_devices() {
  default NNODES 1
  if [[ -n ${GPUS:-} && $GPUS != cpu ]]; then
    export CUDA_VISIBLE_DEVICES=${GPUS// /,}
  elif [[ ${GPUS:-} == cpu ]] || ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    export CUDA_VISIBLE_DEVICES=
    export DS_ACCELERATOR=cpu
    default NPROC 1
    # torchrun would give each process a single thread
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))}
    return
  else
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
  fi
  default NPROC "$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
}

# compose MODULE OPTION...: sets `command`, one process by itself, several under torchrun.
compose() {
  command=("$PYTHON" -m)
  if several_processes; then
    command+=(torch.distributed.run)
    if ((NNODES > 1)); then
      command+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK}" --master-addr "${MASTER_ADDR:?set MASTER_ADDR}"
        --master-port "${MASTER_PORT:-29500}")
    else
      command+=(--standalone)
    fi
    command+=(--nproc-per-node "$NPROC" -m)
  fi
  command+=("$@")
}

# launch RUNNER MODULE OPTION...: runs it by RUNNER, which takes a command (env just runs it); with DRY_RUN, prints it.
# Before torchrun one process looks at all input: torchrun would wrap a clear line in a page of its own and lose the
# exit code.
launch() {
  local runner=$1 command
  shift
  compose "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  if several_processes; then WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m "$@" --check-only || return; fi
  "$runner" "${command[@]}"
}

several_processes() { ((NPROC * NNODES > 1)); }

# ---- training

# The newest run's best checkpoint below a folder of runs, or the folder itself when there is none yet.
best_checkpoint() {
  local run best
  # a run keeps its best N; the highest ROUGE-L (or, without, the lowest loss) is the best of them
  run=$(ls -td "$ROOT/$1"/*/epoch*_step*_loss* 2>/dev/null | head -n 1 || true)
  [[ -n $run ]] || { echo "$1"; return; }
  run=$(dirname "$run")
  best=$(ls -d "$run"/epoch*_rougel* 2>/dev/null | awk -F_rougel '{print $NF "\t" $0}' | sort -g | tail -n 1 | cut -f 2- || true)
  [[ -n $best ]] || best=$(ls -d "$run"/epoch* | awk -F_loss '{print $NF "\t" $0}' | sort -g | head -n 1 | cut -f 2-)
  echo "${best#"$ROOT"/}"
}

# The hyper-parameters of the published runs, where a launcher has no others.
training_defaults() {
  default MODEL_PATH "model_hub/$FAMILY/$CKPT_NAME"
  default MODEL_TYPE "$FAMILY"
  default DATA_DIR data/dolly
  default BATCH_SIZE 4
  default GRAD_ACC 2
  default EPOCH 20
  default LR 5e-4
  default LR_MIN 1e-7
  default LR_SCHEDULER cosine
  default WARMUP_ITERS 0
  default WEIGHT_DECAY 0.01
  default CLIP_GRAD 1.0
  default MAX_LENGTH 512
  default MAX_PROMPT_LENGTH 256
  default PRECISION auto
  default ZERO_STAGE 1
  default SEED 10
  default SAVE_BEST_N_CKPTS 1
  default EVAL_BATCH_SIZE 32
  default LOG_INTERVAL 10
  default RESUME auto
  default SAVE_STATE_EVERY 30m
  default MAX_BAD_STEPS 10
  default LORA_RANK 256
  default LORA_ALPHA 8
  default LORA_DROPOUT 0.1
  if [[ ${PEFT:-} == full ]]; then PEFT=; fi  # every weight, though the launcher has an adapter
  choose_devices
  config=${PEFT:+${PEFT}-rank=${LORA_RANK}-alpha=${LORA_ALPHA}-dropout=${LORA_DROPOUT}}
  config=${config:-default}-$PRECISION
  batch=${BATCH_SIZE}x${GRAD_ACC}x$((NPROC * NNODES))
  options=(
    --model-path "$MODEL_PATH" --model-type "$MODEL_TYPE" --data-dir "$DATA_DIR"
    --batch-size "$BATCH_SIZE" --gradient-accumulation-steps "$GRAD_ACC" --num-epochs "$EPOCH"
    --lr "$LR" --lr-min "$LR_MIN" --lr-scheduler "$LR_SCHEDULER" --warmup-iters "$WARMUP_ITERS"
    --weight-decay "$WEIGHT_DECAY" --clip-grad "$CLIP_GRAD"
    --max-length "$MAX_LENGTH" --max-prompt-length "$MAX_PROMPT_LENGTH"
    --precision "$PRECISION" --zero-stage "$ZERO_STAGE" --seed "$SEED" --log-interval "$LOG_INTERVAL"
    --keep-best-n-checkpoints "$SAVE_BEST_N_CKPTS" --eval-batch-size "$EVAL_BATCH_SIZE"
    --resume "$RESUME" --save-state-every "$SAVE_STATE_EVERY" --max-bad-steps "$MAX_BAD_STEPS"
    ${PEFT:+--peft "$PEFT" --peft-lora-r "$LORA_RANK" --peft-lora-alpha "$LORA_ALPHA" --peft-lora-dropout "$LORA_DROPOUT"}
    ${PEFT_PATH:+--peft-path "$PEFT_PATH"} ${MAX_STEPS:+--max-steps "$MAX_STEPS"}
    ${TRAIN_NUM:+--train-num "$TRAIN_NUM"} ${DEV_NUM:+--dev-num "$DEV_NUM"}
    ${DEEPSPEED_CONFIG:+--deepspeed_config "$DEEPSPEED_CONFIG"}
  )
  if [[ ${GRADIENT_CHECKPOINTING:-0} == 1 ]]; then options+=(--gradient-checkpointing); fi
  if [[ ${EVAL_GEN:-1} == 0 ]]; then options+=(--no-eval-gen); fi
}

# Supervised fine-tuning of FAMILY/CKPT_NAME.
sft() {
  training_defaults
  default SAVE_DIR "outputs/$FAMILY/$CKPT_NAME/sft/criterion=cross_entropy__${config}__epoch=${EPOCH}__bsz=${batch}__lr=${LR}__seed=${SEED}"
  run_training --criterion cross_entropy "${options[@]}" --save-dir "$SAVE_DIR" "$@"
}

# Distillation of TEACHER_MODEL_PATH, with TEACHER_PEFT_PATH if set, into FAMILY/CKPT_NAME.
distil() {
  default KD_OBJ ToDi
  default KD_RATE 0.5
  default KD_TEMP 2.0
  default TEACHER_MODEL_PATH "$(best_checkpoint "outputs/$FAMILY/$TEACHER_NAME/sft")"
  default TEACHER_MODEL_TYPE "$FAMILY"
  default TEACHER_CACHE auto
  default TEACHER_CACHE_DTYPE own
  if [[ ${TEACHER_PEFT_PATH:-} == none ]]; then TEACHER_PEFT_PATH=; fi  # though the launcher has an adapter
  training_defaults
  # KD_PARAMS="beta=0.5": parameters of the divergence; SKEW_LAMBDA=0.1 is short for one of them
  local params="${KD_PARAMS:-}${SKEW_LAMBDA:+ skew_lambda=$SKEW_LAMBDA}"
  if [[ -n $params ]]; then
    read -ra params <<<"$params"
    options+=(--kd-params "${params[@]}")
  fi
  local objective="criterion=vanilla_kd__kd^obj=${KD_OBJ}__${config}__teacher=${TEACHER_NAME}__kd^rate=${KD_RATE}__kd^temp=${KD_TEMP}"
  default SAVE_DIR "outputs/$FAMILY/$CKPT_NAME/vanilla_kd/${objective}__epoch=${EPOCH}__bsz=${batch}__lr=${LR}__seed=${SEED}"
  run_training --criterion vanilla_kd --kd-objective "$KD_OBJ" --kd-rate "$KD_RATE" --kd-temperature "$KD_TEMP" \
    --teacher-model-path "$TEACHER_MODEL_PATH" --teacher-model-type "$TEACHER_MODEL_TYPE" \
    ${TEACHER_PEFT_PATH:+--teacher-peft-path "$TEACHER_PEFT_PATH"} ${TEACHER_DTYPE:+--teacher-dtype "$TEACHER_DTYPE"} \
    --teacher-cache "$TEACHER_CACHE" --teacher-cache-dtype "$TEACHER_CACHE_DTYPE" "${options[@]}" --save-dir "$SAVE_DIR" "$@"
}

run_training() {
  cd "$ROOT"
  if [[ -n ${DOCTOR:-} ]]; then WORLD_SIZE=$((NPROC * NNODES)) exec "$PYTHON" -m todi.doctor "$@"; fi
  launch run_to_its_end todi.train "$@"
}

# Runs a command and hands on the signals that ask it to stop: to the training processes themselves, for torchrun would
# give them 30 seconds. The exit code is then 128 + the signal's number.
run_to_its_end() {
  local child status=0 received=0 name
  set -m  # a process group of its own: Ctrl-C reaches the training once, through us
  "$@" &
  child=$!
  set +m
  for name in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "received=$(kill -l $name); hand_on $name $child" $name
  done
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trap cuts the waiting short
  wait "$child" || status=$?
  trap - TERM INT USR1
  ((received == 0 || status == 0)) || status=$((128 + received))
  return "$status"
}

# hand_on NAME PID: the signal, to the training processes: PID or, when that is torchrun, its children.
hand_on() {
  local processes=$2
  # pgrep is not everywhere, nor is /proc
  if several_processes; then processes=$(pgrep -P "$2" 2>/dev/null || cat "/proc/$2/task/$2/children"); fi
  # shellcheck disable=SC2086
  kill "-$1" $processes 2>/dev/null || true
}

# ---- evaluation

# evaluate OPTION...: scores one model on SETS with SEEDS.
evaluate() {
  default DATA_DIR data
  default SETS "dolly self-inst vicuna sinst/11_ uinst/11_"
  default SEEDS "10 20 30 40 50"
  default MAX_LENGTH 512
  default MAX_PROMPT_LENGTH 256
  default PRECISION auto
  choose_devices
  local sets seeds
  read -ra sets <<<"$SETS"
  read -ra seeds <<<"$SEEDS"
  cd "$ROOT"
  set -- --data-dir "$DATA_DIR" --sets "${sets[@]}" --seeds "${seeds[@]}" --max-length "$MAX_LENGTH" \
    --max-prompt-length "$MAX_PROMPT_LENGTH" --precision "$PRECISION" ${LIMIT:+--limit "$LIMIT"} "$@"
  launch env todi.evaluate "$@"
}
