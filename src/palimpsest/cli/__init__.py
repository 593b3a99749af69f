"""The command line: one file per verb, heavy libraries imported only when a verb runs."""
