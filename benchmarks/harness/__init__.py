"""What every benchmark shares: running subjects, summaries, the machine, promises, reports."""
