"""The command line: one run, ranks started on this machine, sweeps and jobs on a cluster."""
