# What all launchers share. Source it, set the defaults that differ, call sft, distil, seqkd or evaluate.
#
# docs/settings.md lists the variables: what is set outside wins over a launcher's `default`, which wins over the
# declared one. Words after the launcher's name go to the Python command as they are.
#
# It is written for bash 3.2, which is what macOS has: no mapfile, no ${name,,}, no [[ -v name ]], and an array that may be
# empty is expanded as ${array[@]+"${array[@]}"}.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The published names of some variables count where ours are not set.
for names in CKPT_PATH:MODEL_PATH SAVE_PATH:SAVE_DIR CKPT_TYPE:MODEL_TYPE TEACHER_MODEL_NAME:TEACHER_NAME GPUS_PER_NODE:NPROC; do
  old=${names%:*} new=${names#*:}
  if [[ -n ${!old:-} && -z ${!new:-} ]]; then export "$new=${!old}"; fi
done

# default NAME VALUE: gives the variable its value unless it has one.
default() { [[ -n ${!1:-} ]] || export "$1=$2"; }

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

if [[ -z ${PYTHON:-} ]]; then
  if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=$(command -v python3 || echo python); fi
fi
export PYTHONPATH=$ROOT/code${PYTHONPATH:+:$PYTHONPATH}

# Sets CUDA_VISIBLE_DEVICES, NPROC and, without a GPU, DS_ACCELERATOR.
choose_devices() {
  local devices device='([0-9]+|GPU-[^,]+|MIG-[^,]+)'
  default NNODES 1
  [[ $NNODES == 1 ]] || default MASTER_PORT 29500
  if [[ -n ${GPUS[*]:-} ]]; then
    devices=$(tr -s '(), \t' ',' <<<"${GPUS[*]}")  # 0,1 or "0 1" or (0 1)
    devices=${devices#,} devices=${devices%,}
    if [[ $devices =~ ^([Cc][Pp][Uu]|[Nn][Oo][Nn][Ee]|-1)$ ]]; then devices=
    elif [[ ! $devices =~ ^$device(,$device)*$ ]]; then die "GPUS must be numbers or names of devices, or cpu; got ${GPUS[*]}"; fi
  elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    devices=$(tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES")
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    devices=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)
  fi
  # CUDA sees what comes before the first that there cannot be: -1, NoDevFiles, nothing
  devices=$(grep -oE "^$device(,$device)*" <<<"${devices:-}" || true)
  export CUDA_VISIBLE_DEVICES=$devices
  if [[ -z $devices ]]; then
    export DS_ACCELERATOR=cpu
    default NPROC 1
  fi
  default NPROC "$(tr ',' '\n' <<<"$devices" | grep -c .)"
}

# Loads an allocator before a process on a CPU that keeps what a step frees in less memory than glibc, which does so
# otherwise (todi/runtime/allocator.py): tcmalloc where it is installed, else the mimalloc of the Python environment.
# What a user loads or sets stays.
choose_allocator() {
  local library mimalloc chosen=' --allocator (glibc|system) '
  [[ -z $CUDA_VISIBLE_DEVICES && -z ${LD_PRELOAD:-}${GLIBC_TUNABLES:-} ]] || return 0
  [[ ! " ${options[*]} " =~ $chosen ]] || return 0
  library=$(PATH=$PATH:/sbin ldconfig -p 2>/dev/null | grep -oE -m1 '/\S*/libtcmalloc(_minimal)?\.so\.[0-9]+$' || true)
  for mimalloc in "${PYTHON%/bin/*}"/lib/python3*/site-packages/cmeel.prefix/lib/libmimalloc.so; do
    if [[ -z $library && -f $mimalloc ]]; then
      library=$mimalloc
      default MIMALLOC_PURGE_DELAY -1  # never give back
    fi
  done
  [[ -z $library ]] || export LD_PRELOAD=$library
}

several_processes() { ((${NPROC:-1} * ${NNODES:-1} > 1)); }

# launch RUNNER MODULE OPTION...: runs it, one process by itself, several under torchrun, by RUNNER, which takes a
# command; with DRY_RUN, prints it. Before torchrun one process looks at all input, so that each problem is said once.
launch() {
  local runner=$1 module=("${@:2}") nodes=(--standalone) torchrun=()
  if ((NNODES > 1)); then
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    [[ -z ${RENDEZVOUS_ID:-} ]] || nodes+=(--rdzv-id "$RENDEZVOUS_ID")
  fi
  if several_processes; then torchrun=(todi.runtime.ranks "${nodes[@]}" --nproc-per-node "$NPROC" -m); fi
  set -- "$PYTHON" -m ${torchrun[@]+"${torchrun[@]}"} "${module[@]}"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
    return
  fi
  export TODI_PARENT=$$  # what we start ends when we are killed (todi/runtime/parent.py)
  if several_processes; then WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m "${module[@]}" --check-only || return; fi
  "$runner" "$@"
}

# read_settings COMMAND WORD...: sets `options`: what the variables say as options of todi.COMMAND, then the words.
read_settings() {
  local words
  set +a
  cd "$ROOT"
  choose_devices
  words=$("$PYTHON" -m todi.launch "$1" "${@:2}")
  eval "options=($words)"  # they are quoted for a shell
  # torchrun would give each process a single thread
  if [[ -z $CUDA_VISIBLE_DEVICES ]]; then default OMP_NUM_THREADS "$(($(cores) > NPROC ? $(cores) / NPROC : 1))"; fi
  choose_allocator
}

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }  # macOS has no nproc

sft() { train cross_entropy "$@"; }
distil() { train vanilla_kd "$@"; }

# evaluate OPTION MODEL [EVAL_BATCH_SIZE] [WORD...]
evaluate() {
  local model=("$1" "$2")
  shift 2
  if (($# > 0)) && [[ -z $1 ]]; then shift; fi
  [[ ! ${1:-} =~ ^[0-9]+$ ]] || set -- --batch-size "$@"
  read_settings evaluate "${model[@]}" "$@"
  launch run_to_its_end todi.evaluate "${options[@]}"
}

# seqkd WORD...: has the teacher answer the prompts of DATA_DIR, once, then trains the student on its text by SFT. The
# words go to the training.
seqkd() {
  local text data=' --data-dir[= ]' check=' --check-only '
  trains_by cross_entropy
  [[ ! " $* " =~ $data ]] || die "--data-dir would be trained on in place of the teacher's text; set DATA_DIR, the folder of the prompts"
  read_settings generate
  text=${options[${#options[@]} - 1]}
  if [[ -z ${DRY_RUN:-} && (-n ${DOCTOR:-} || " ${options[*]} $* " =~ $check) ]]; then
    WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m todi.generate "${options[@]}" --check-only
    if [[ ! -f $text/train.jsonl ]]; then
      echo "the training will be looked at when $text/train.jsonl is there"
      return
    fi
  else
    launch run_to_its_end todi.generate "${options[@]}"
  fi
  DATA_DIR=$(printf %q "$text")
  export DATA_DIR
  sft "$@"
}

# trains_by CRITERION: says so, or stops where it is told otherwise.
trains_by() {
  [[ ${CRITERION:-$1} == "$1" ]] || die "this launcher trains with CRITERION=$1, got $CRITERION; take an sft_*.sh or a vanilla_kd_*.sh"
  export CRITERION=$1
}

# train CRITERION WORD...
train() {
  trains_by "$1"
  read_settings train "${@:2}"
  if [[ -n ${DOCTOR:-} ]]; then WORLD_SIZE=$((NPROC * NNODES)) exec "$PYTHON" -m todi.doctor "${options[@]}"; fi
  launch run_again_if_it_fails todi.train "${options[@]}"
}

# Runs a training to its end; one that breaks off goes on from its last state, up to MAX_RESTARTS times. One that was asked
# to stop, or whose input is refused (2), does not.
run_again_if_it_fails() {
  local status restarts=0
  [[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || die "MAX_RESTARTS must be a whole number, got $MAX_RESTARTS"
  while :; do
    status=0
    run_to_its_end "$@" || status=$?
    if ((status == 0 || status == 2 || received > 0 || restarts >= ${MAX_RESTARTS:-0})); then return "$status"; fi
    restarts=$((restarts + 1))
    echo "the training ended with exit code $status; going on from its last state (restart $restarts of $MAX_RESTARTS)" >&2
    set -- "$@" --resume auto  # where it was never, the next would start anew
  done
}

# Runs a command and hands on the signals that ask it to stop: to the training processes themselves, for torchrun would
# give them 30 seconds. The exit code is then 128 + the signal's number, which is in `received`, else 0.
run_to_its_end() {
  local child status=0 name
  received=0
  set -m  # a process group of its own: Ctrl-C reaches the training once, through us
  "$@" &
  child=$!
  set +m
  for name in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064
    trap "received=$(kill -l $name); hand_on $name $child" $name
  done
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trap cuts the waiting short
  wait "$child" || status=$?
  trap - TERM INT USR1 HUP
  # what failed after the signal, or was killed, has failed
  ((received == 0 || status == 137 || (status < 128 && status != 75))) || status=$((128 + received))
  # of several processes their parent has said it
  if ((received == 0 && status > 128)) && ! several_processes; then
    name=$(kill -l $((status - 128)) 2>/dev/null || true)
    echo "error: the process (pid $child) was ended by signal $((status - 128))${name:+, SIG$name}" >&2
  fi
  return "$status"
}

# hand_on NAME PID: the signal, to the training processes: PID or, when that is torchrun, its children.
hand_on() {
  local processes=$2
  # pgrep is not everywhere, nor is /proc
  if several_processes; then processes=$(pgrep -P "$2" 2>/dev/null || cat "/proc/$2/task/$2/children" 2>/dev/null || true); fi
  # shellcheck disable=SC2086
  kill "-$1" ${processes:-$2} 2>/dev/null || true  # it may have started none yet
}

set -a  # what a launcher assigns is a setting, also without `default`
