#!/usr/bin/env bash
# One run over several machines, started by hand: the same command on each of them.
#
#     NODES=2 HEAD=node-1 scripts/multinode/torchrun.sh experiment=paper/355m_sophiag strategy=fsdp
#
# NODES   machines
# HEAD    the machine where the ranks meet, with a port if 29500 is taken: node-1:29501
# RANKS   ranks of each machine; its GPUs, if not given
# RETRIES how often dead ranks are started again, from the last checkpoint
#
# The run directory must be on a file system that all machines share, and so must the tokens, or be in the same place on
# each. Ctrl-C, SIGTERM and SIGUSR1 let the run save first: five minutes at most.
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
