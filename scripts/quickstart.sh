#!/usr/bin/env bash
# The whole pipeline on any machine, a laptop CPU included:  bash scripts/quickstart.sh
# Installs, fetches SmolLM2-135M, fine-tunes it, distils it by ToDi into a 12-layer copy of itself, scores both.
# Whatever is already there is skipped; remove outputs/quickstart to start over.
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
source "$ROOT/scripts/lib/setup.sh"
cd "$ROOT"

teacher=model_hub/smollm2/smollm2-135m-instruct
student=model_hub/smollm2/smollm2-12-layers
out=outputs/quickstart

# stage TITLE DONE COMMAND...: runs the command unless the file or folder pattern DONE exists.
stage() {
  echo "== $1"
  if compgen -G "$2" >/dev/null; then echo "   already there: $2"; else "${@:3}"; fi
}

set_up
export PYTHON DATA_DIR=data/demo DEV_NUM=40 EPOCH=1 BATCH_SIZE=8 GRAD_ACC=1 EVAL_BATCH_SIZE=40
export MAX_LENGTH=160 MAX_PROMPT_LENGTH=120 WARMUP_ITERS=5 NPROC=1

stage "teacher: SmolLM2-135M-Instruct" "$teacher/config.json" \
  bash scripts/models/fetch.sh smollm2-135m-instruct
stage "student: its 12 most needed layers" "$student/config.json" \
  bash scripts/smollm2/prune_smollm2.sh
stage "fine-tuning the teacher on data/demo" "$out/teacher/epoch*" \
  env MAX_STEPS=32 LR=3e-4 SAVE_DIR=$out/teacher bash scripts/smollm2/sft_teacher_smollm2.sh
tuned=$(compgen -G "$out/teacher/epoch*" | head -n 1)
stage "distilling it into the student by ${KD_OBJ:=ToDi}" "$out/$KD_OBJ/epoch*" \
  env KD_OBJ="$KD_OBJ" MAX_STEPS=80 LR=1e-3 TEACHER_MODEL_PATH="$tuned" SAVE_DIR="$out/$KD_OBJ" bash scripts/smollm2/vanilla_kd_smollm2.sh
distilled=$(compgen -G "$out/$KD_OBJ/epoch*" | head -n 1)

unset DATA_DIR
export SETS=demo SEEDS=10
stage "scoring the student before" "$out/before/eval/results.json" \
  bash scripts/eval/run_eval.sh $student 80 --save-dir $out/before
stage "scoring the student after" "$distilled/eval/results.json" \
  bash scripts/eval/run_eval.sh "$distilled" 80
stage "scoring the teacher" "$tuned/eval/results.json" \
  bash scripts/eval/run_eval.sh "$tuned" 80
stage "drawing the training curves" "$out/curves.png" \
  "$PYTHON" -m todi.plot $out/teacher "$out/$KD_OBJ" --names "teacher, SFT" "student, $KD_OBJ" --output $out/curves.png

echo "== ROUGE-L on data/demo/valid.jsonl (training curves: $out/curves.png)"
"$PYTHON" -m todi.report $out/before "$distilled" "$tuned" --names "student, pruned" "student, distilled ($KD_OBJ)" teacher
