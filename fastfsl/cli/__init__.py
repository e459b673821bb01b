"""The fastfsl command line: one file per command, imports inside."""
