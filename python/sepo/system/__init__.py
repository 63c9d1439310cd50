"""Stand between a process and its machine: whole files, checksums, locks, variables."""
