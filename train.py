"""Train a GPT-2 with the optimizer that the configuration names.

    python train.py optimizer=sophiag                                  one process
    python train.py optimizer=sophiag launcher.nproc_per_node=8        eight ranks, started here
    torchrun --nproc_per_node=8 train.py optimizer=sophiag             eight ranks, started by torchrun
    python train.py -m optimizer=adamw,lion,sophiag seed=0,1,2         a sweep
    python train.py experiment=paper/125m_sophiag                      a complete recipe
    python train.py --config-path runs/<name> output_dir=runs/again    run a recorded run again
    python train.py --help                                             every group and key

Exit codes: 0 finished, 1 failed, 2 the configuration cannot be run (one line says why), 3 diverged, 75 preempted (start the same
command again and it goes on), 77 another process has the run directory.
"""

import sys

if __name__ == "__main__":
    from training.environment import require_environment

    require_environment()

    from training.lifeline import die_with_launcher
    from training.limits import address_space_failure

    die_with_launcher()
    failure = address_space_failure()
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    try:
        from training.command import main  # takes a while, in which the launcher may die

        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # a run that has begun notices signals itself
        print("SIGINT before training has begun: ending", file=sys.stderr)
        sys.exit(75)
