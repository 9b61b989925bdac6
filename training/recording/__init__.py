"""What a run writes and shows: the record, the ledger, the display, the trackers."""
