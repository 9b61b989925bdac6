#!/usr/bin/env bash
# One run over several machines, started by hand: run the same command on each.
#
#     NODES=2 HEAD=node-1 scripts/multinode/torchrun.sh experiment=paper/355m_sophiag strategy=fsdp
#
# NODES   number of machines
# HEAD    the machine where the ranks meet, with a port if 29500 is taken: node-1:29501
# RANKS   ranks per machine; default: its number of GPUs
# RETRIES how often dead ranks are restarted from the last checkpoint
#
# The run directory must be on a filesystem that all machines share. The tokens must be on one too, or at the same path on
# each machine. On Ctrl-C, SIGTERM and SIGUSR1 the run saves first, within five minutes.
set -euo pipefail

: "${NODES:?how many machines}" "${HEAD:?the machine where the ranks meet}"
RANKS=${RANKS:-gpu}
RETRIES=${RETRIES:-3}
case $HEAD in *:*) ;; *) HEAD=$HEAD:29500 ;; esac
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" \
    --nproc-per-node="$RANKS" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD" \
    --rdzv-id=sophia \
    --max-restarts="$RETRIES" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout=300 \
    train.py "$@"
