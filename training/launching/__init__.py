"""The command line: single runs, ranks on this machine, sweeps, and jobs on a cluster."""
