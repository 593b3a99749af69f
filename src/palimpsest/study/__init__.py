"""Studies: methods x requests x seeds, resumable, in one process or many."""
