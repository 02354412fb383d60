#!/bin/bash
# Slurm's Prolog, or a part of it: before a job starts, the gate tries each GPU that the job gets, all at the same time.
# Set VERIFY and EXPECT. slurmd runs it as root and without a PATH; PrologTimeout must be longer than WITHIN_S.
# Any code but 0 drains the node and puts the job back into the queue, also where the gate came to no verdict. An option
# that the gate refuses is the exception: it is the same on every node, so it would drain the whole fleet and says
# nothing about any GPU. It is logged, and the job starts.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin
# Slurm counts GPUs in this order
export CUDA_DEVICE_ORDER=PCI_BUS_ID

VERIFY=/opt/triattention-verify/bin/triattention-verify
EXPECT=sm90
WITHIN_S=45

# a job without GPUs
[[ -n ${SLURM_JOB_GPUS:-} ]] || exit 0

lines=$(mktemp -d) || exit 1
trap 'rm -rf "$lines"' EXIT
cd "$lines" || exit 1

# the files have numbers, because the name of a MIG slice may have a slash
IFS=, read -r -a gpus <<< "$SLURM_JOB_GPUS"
gates=()
for number in "${!gpus[@]}"; do
    gpu=${gpus[number]}
    "$VERIFY" gate --contract slurm --gpu "$gpu" --expect "$EXPECT" --within "$WITHIN_S" > "$lines/$number" &
    gates[number]=$!
done
code=0
for number in "${!gpus[@]}"; do
    wait "${gates[number]}"
    ended=$?
    [[ $ended != 0 ]] || continue
    read -r reason < "$lines/$number" || true
    # such as 127: there is no such program
    reason="${reason:-[node_problem] $VERIFY ended with code $ended and gave no reason} (GPU ${gpus[number]})"
    if [[ $reason == "[user_problem]"* ]]; then
        echo "triattention-verify: nothing was tried: $reason" >&2
        logger -t triattention-verify -- "nothing was tried: $reason" 2> /dev/null || true
        continue
    fi
    code=1
    # the reason that `sinfo -R` shows; without this it is "Prolog error"
    scontrol update NodeName="$SLURMD_NODENAME" State=DRAIN Reason="$reason"
done
exit "$code"
