"""One file per op: its problem, its providers, its model of work and its truth."""
