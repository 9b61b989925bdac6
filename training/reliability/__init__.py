"""What keeps a run alive and its files whole: checkpoints, resumption, signals, the watchdog, guards."""
