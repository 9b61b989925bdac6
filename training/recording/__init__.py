"""A run's outputs: record, ledger, display and trackers."""
