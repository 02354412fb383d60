#!/bin/bash
# Slurm's Prolog, or a part of it: before a job starts, the gate tries each GPU that the job gets, all at the same time.
# Set PYTHON and EXPECT. slurmd runs it as root and without a PATH; PrologTimeout must be longer than WITHIN_S.
# Any code but 0 drains the node and puts the job back into the queue, also where the gate came to no verdict.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin
# Slurm counts GPUs in this order
export CUDA_DEVICE_ORDER=PCI_BUS_ID

PYTHON=/opt/triattention-verify/bin/python
EXPECT=sm90
WITHIN_S=45

# a job without GPUs
[[ -n ${SLURM_JOB_GPUS:-} ]] || exit 0

lines=$(mktemp -d) || exit 1
trap 'rm -rf "$lines"' EXIT
cd "$lines" || exit 1

declare -A gates
for gpu in ${SLURM_JOB_GPUS//,/ }; do
    "$PYTHON" -m verify gate --contract slurm --gpu "$gpu" --expect "$EXPECT" --within "$WITHIN_S" > "$lines/$gpu" &
    gates[$gpu]=$!
done
code=0
for gpu in "${!gates[@]}"; do
    if ! wait "${gates[$gpu]}"; then
        code=1
        # the reason that `sinfo -R` shows; without this it is "Prolog error"
        scontrol update NodeName="$SLURMD_NODENAME" State=DRAIN Reason="$(head -n 1 "$lines/$gpu") (GPU $gpu)"
    fi
done
exit "$code"
