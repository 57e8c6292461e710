#!/usr/bin/env bash
# The whole pipeline on any machine, a laptop CPU included:  bash scripts/quickstart.sh
# Installs, fetches SmolLM2-135M, fine-tunes it, makes a 12-layer copy of it, trains that in three ways for as many steps
# (SFT, forward KL, ToDi; both distillations from one cached teacher), scores all of them on data/demo/valid.jsonl.
# Whatever is already there is skipped; remove outputs/quickstart to start over. KD_OBJ takes another one for ToDi.
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
source "$ROOT/scripts/lib/setup.sh"
cd "$ROOT"

teacher=model_hub/smollm2/smollm2-135m-instruct
student=model_hub/smollm2/smollm2-12-layers
out=outputs/quickstart
objective=${KD_OBJ:-ToDi} other=forward_kl
[[ $objective != "$other" ]] || other=reverse_kl

# stage TITLE DONE COMMAND...: runs the command unless the file or folder pattern DONE exists.
stage() {
  echo "== $1"
  if compgen -G "$2" >/dev/null; then echo "   already there: $2"; else "${@:3}"; fi
}

# checkpoint NAME: of the run $out/NAME.
checkpoint() { compgen -G "$out/$1/epoch*" | head -n 1; }

# score NAME MODEL [WORD...]
score() { stage "scoring: $1" "${4:-$2}/eval/results.json" bash scripts/eval/run_eval.sh "$2" "${@:3}"; }

set_up
export PYTHON DATA_DIR=data/demo DEV_NUM=40 EPOCH=1 BATCH_SIZE=8 GRAD_ACC=1
export MAX_LENGTH=160 MAX_PROMPT_LENGTH=120 WARMUP_ITERS=5 NPROC=1

stage "teacher: SmolLM2-135M-Instruct" "$teacher/config.json" \
  bash scripts/models/fetch.sh smollm2-135m-instruct
stage "student: its 12 most needed layers" "$student/config.json" \
  bash scripts/smollm2/prune_smollm2.sh
stage "fine-tuning the teacher on data/demo, 150 steps" "$out/teacher/epoch*" \
  env LR=3e-4 SAVE_DIR=$out/teacher bash scripts/smollm2/sft_teacher_smollm2.sh
tuned=$(checkpoint teacher)

# the students: 640 of the teacher's 1,200 records once, 80 steps of 8
export TRAIN_NUM=640 LR=1e-3
stage "fine-tuning the student: the baseline" "$out/SFT/epoch*" \
  env SAVE_DIR=$out/SFT bash scripts/smollm2/sft_smollm2.sh
for one in $other "$objective"; do
  stage "distilling the teacher into the student by $one" "$out/$one/epoch*" \
    env KD_OBJ="$one" TEACHER_MODEL_PATH="$tuned" TEACHER_CACHE=$out/teacher_cache SAVE_DIR="$out/$one" \
    bash scripts/smollm2/vanilla_kd_smollm2.sh
done

unset DATA_DIR
export SETS=demo SEEDS="10 20 30"
names=("student, pruned" "student, SFT" "student, $other" "student, $objective" teacher)
models=("$out/before" "$(checkpoint SFT)" "$(checkpoint "$other")" "$(checkpoint "$objective")" "$tuned")
score "${names[0]}" "$student" --save-dir "${models[0]}"
for i in 1 2 3 4; do score "${names[i]}" "${models[i]}"; done

stage "drawing training curves and scores" "$out/curves.png" \
  "$PYTHON" -m todi.plot $out/SFT $out/$other "$out/$objective" --names "${names[@]:1:3}" \
  --scores "${models[@]}" --score-names "${names[@]}" --output $out/curves.png

echo "== ROUGE-L on data/demo/valid.jsonl (training curves: $out/curves.png)"
"$PYTHON" -m todi.report "${models[@]}" --names "${names[@]}" --baseline "${models[3]}"
