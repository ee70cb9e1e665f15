"""What everything stands on: modes, random state, processes, progress, digests, lazy faces."""
