#!/usr/bin/env bash
# Submit a training to Slurm, or with --dry-run only show what would run:
#   EXP_NAME=first NUM_ACTOR_NODES=8 REPO_LOCATION=$PWD bash submit.sh [--dry-run] --config=config.yaml [key=value ...]
# The arguments are train_grpo.py's. Variables (docs/slurm.md has the table):
#   required   EXP_NAME, NUM_ACTOR_NODES, REPO_LOCATION (this repository, on a file system that all nodes share)
#   optional   GPUS_PER_NODE (8; 0: CPU), ACCOUNT, PARTITION, TIME (04:00:00), REQUEUE=1, CPUS_PER_NODE (unset: whole
#              nodes), CONTAINER and MOUNTS (pyxis; unset: bare metal), VENV, BASE_LOG_DIR, JOIN_TIMEOUT (900 s),
#              SBATCH_ARGS, COMMAND (instead of train_grpo.py; empty: an idle cluster to attach to)
# WANDB_API_KEY, HF_TOKEN and other secrets are taken from the environment by Slurm; they are never written here.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run=0
if [[ ${1-} == --dry-run ]]; then
    dry_run=1
    shift
fi

# ---- Checks: everything that can be known before the job waits in a queue
missing=
for name in EXP_NAME NUM_ACTOR_NODES REPO_LOCATION; do
    [[ -n ${!name-} ]] || missing+=" $name"
done
[[ -z $missing ]] || fail "set$missing; see the head of submit.sh"
[[ $EXP_NAME =~ ^[A-Za-z0-9._-]+$ ]] ||
    fail "EXP_NAME='$EXP_NAME' names a folder and a job: letters, digits, . _ - only"
[[ $NUM_ACTOR_NODES =~ ^[1-9][0-9]*$ ]] || fail "NUM_ACTOR_NODES='$NUM_ACTOR_NODES' is not a number of nodes"
[[ ${GPUS_PER_NODE:=8} =~ ^[0-9]+$ ]] || fail "GPUS_PER_NODE='$GPUS_PER_NODE' is not a number of GPUs"
[[ ${REQUEUE:=0} =~ ^[01]$ ]] || fail "REQUEUE='$REQUEUE' is neither 0 nor 1"
[[ -f $REPO_LOCATION/ray.sub && -f $REPO_LOCATION/train_grpo.py ]] ||
    fail "REPO_LOCATION='$REPO_LOCATION' does not hold ray.sub and train_grpo.py"
command -v sbatch >/dev/null || ((dry_run)) || fail "no sbatch here: run this on a Slurm login node"
REPO_LOCATION=$(realpath "$REPO_LOCATION")
BASE_LOG_DIR=$(realpath -m "${BASE_LOG_DIR:-$REPO_LOCATION/results/$EXP_NAME}")
if [[ -n ${CONTAINER-} ]]; then
    [[ -n ${MOUNTS-} ]] || fail "CONTAINER is set but MOUNTS is not; it must show $REPO_LOCATION: MOUNTS=/home:/home"
    VENV=${VENV-} # the container's own Python
else
    [[ -z ${MOUNTS-} ]] || fail "MOUNTS is set but CONTAINER is not"
    VENV=${VENV:-$REPO_LOCATION/.venv}
    [[ -x $VENV/bin/ray ]] || fail "no Ray in VENV=$VENV; make the environment there, or set VENV or CONTAINER"
fi

# ---- The driver's command: the arguments as given, and what they leave open
args=("$@")
default() {
    local given
    for given in "${args[@]}"; do
        [[ ${given##+} != "$1="* && $given != "++$1="* ]] || return 0
    done
    args+=("$1=$2")
}
if [[ -z ${COMMAND+set} ]]; then
    default cluster.num_nodes "$NUM_ACTOR_NODES"
    default cluster.gpus_per_node "$GPUS_PER_NODE"
    default logger.log_dir "results/$EXP_NAME"
    default logger.wandb.name "$EXP_NAME"
    default checkpointing.checkpoint_dir "results/$EXP_NAME"
    COMMAND=$(printf '%q ' python train_grpo.py "${args[@]}")
    if [[ -n $VENV ]]; then # an unknown key or a missing file is better known now than when the nodes come
        (cd "$REPO_LOCATION" && RAY_ADDRESS=later "$VENV/bin/python" launch.py "${args[@]}")
    fi
elif (($#)); then
    fail "arguments are train_grpo.py's, but COMMAND is set: put them into it"
fi

# ---- Slurm's side
read -ra extra <<<"${SBATCH_ARGS-}"
job=(--job-name="$EXP_NAME" --nodes="$NUM_ACTOR_NODES" --ntasks-per-node=1 --time="${TIME:-04:00:00}"
    --signal=B:USR1@300 --chdir="$REPO_LOCATION" --output="$BASE_LOG_DIR/slurm-%j.log" --open-mode=append --export=ALL)
[[ -z ${ACCOUNT-} ]] || job+=(--account="$ACCOUNT")
[[ -z ${PARTITION-} ]] || job+=(--partition="$PARTITION")
((GPUS_PER_NODE == 0)) || job+=(--gpus-per-node="$GPUS_PER_NODE")
if [[ -n ${CPUS_PER_NODE-} ]]; then job+=(--cpus-per-task="$CPUS_PER_NODE"); else job+=(--exclusive --mem=0); fi
if ((REQUEUE)); then job+=(--requeue); else job+=(--no-requeue); fi
job+=("${extra[@]}" "$REPO_LOCATION/ray.sub")

echo "driver:  ${COMMAND:-none, an idle cluster}"
echo "submit:  $(printf '%q ' sbatch "${job[@]}")"
((!dry_run)) || exit 0
export COMMAND VENV REPO_LOCATION BASE_LOG_DIR GPUS_PER_NODE REQUEUE
mkdir -p "$BASE_LOG_DIR"
id=$(sbatch --parsable "${job[@]}")
id=${id%%;*}
logs=$BASE_LOG_DIR/$id-logs
cat <<END
job:     $id, its log $BASE_LOG_DIR/slurm-$id.log
logs:    $logs: driver.log, ray-NODE.log
follow:  tail -F $logs/driver.log
attach:  bash $logs/attach.sh
stop:    scancel --batch --signal=USR1 $id   # saves and exits with code 85; the same submit.sh continues
cancel:  scancel $id
END
