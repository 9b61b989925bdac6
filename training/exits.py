"""How a process of this project ends, for the shell, the launcher and the scheduler that started it."""

EXIT_FAILED = 1
EXIT_CONFIGURATION = 2  # cannot be run as asked; one line says why
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL: the same command resumes
EXIT_RANK_LOST = 76  # EX_PROTOCOL: this rank is well, another one is gone
EXIT_HELD = 77  # another process has the run directory
