"""Train a GPT-2 with the optimizer that the configuration names.

    python train.py optimizer=sophiag                                  one process
    python train.py optimizer=sophiag launcher.nproc_per_node=8        eight ranks, started here
    torchrun --nproc_per_node=8 train.py optimizer=sophiag             eight ranks, started by torchrun
    python train.py -m optimizer=adamw,lion,sophiag seed=0,1,2         a sweep
    python train.py experiment=paper/125m_sophiag                      a complete recipe
    python train.py --config-path runs/<name> output_dir=runs/again    a recorded run, repeated
    python train.py --help                                             every group and key

Exit codes: 0 finished, 1 failed, 2 the configuration cannot be run (one line says why), 3 diverged, 75 preempted (rerun the
same command to resume), 77 another process has the run directory.
"""

import sys

if __name__ == "__main__":
    from training.launching.environment import require_environment

    require_environment()

    from training.exits import EXIT_CONFIGURATION, EXIT_PREEMPTED
    from training.launching.lifeline import die_with_launcher
    from training.launching.limits import address_space_failure

    die_with_launcher()
    failure = address_space_failure()
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
    try:
        from training.launching.command import main  # slow

        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # a started run handles signals itself
        print("SIGINT before training started: exiting", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
