#!/bin/bash
# A run that survives the loss of a process within one job, or without any scheduler: torchrun starts the group again.
#
#   RUN_DIR=runs/mine launch/slurm/elastic.sh recipe=nvfp4_tiny train.checkpoint_every=500            one machine
#   RUN_DIR=/shared/mine NODES=4 RENDEZVOUS=node1:29400 launch/slurm/elastic.sh recipe=...            on each of four
#
# When a worker dies, torchrun ends the others and starts all of them again, at most MAX_RESTARTS times. The new group
# resumes from the newest checkpoint in RUN_DIR by itself, in the same W&B run: nothing else is needed. What is lost are
# the steps since that checkpoint, and they are done again with the same numbers. torchrun does not look at exit codes,
# so a wrong command is tried MAX_RESTARTS times too; leave train.time_limit_s at 0 here, it would be taken for a death.
#
#   RUN_DIR              the run folder, on a disk that all nodes share (required)
#   NODES                nodes, or MIN:MAX: with fewer than MAX the run goes on with those there are   (default: 1)
#   RENDEZVOUS           host:port of one of the nodes, the same on all                  (default: this machine alone)
#   PROCESSES_PER_NODE   processes a node, or gpu, cpu, auto                             (default: auto)
#   MAX_RESTARTS         of the group                                                    (default: 10)
#
# With MIN:MAX the number of ranks changes between starts: keep train.global_batch a multiple of train.micro_batch times
# each number that may come, and leave one size of parallel= at 0 ("all that are left").

set -eu
: "${RUN_DIR:?set RUN_DIR to the run folder}"
if [ -n "${RENDEZVOUS:-}" ]; then
    rendezvous="--nnodes ${NODES:-1} --rdzv-backend c10d --rdzv-endpoint $RENDEZVOUS --rdzv-id $(basename "$RUN_DIR")"
else
    rendezvous="--standalone"
fi
# The workers must not use torchrun's own store: it outlives them, and in it a new group finds the addresses of the dead
# one, to which it then tries to connect (seen with torch 2.13 and gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# $rendezvous is several words
exec "${TORCHRUN:-torchrun}" $rendezvous --nproc-per-node "${PROCESSES_PER_NODE:-auto}" \
    --max-restarts "${MAX_RESTARTS:-10}" --monitor-interval 1 \
    --no-python lowprec-train "$@" run.dir="$RUN_DIR"
