"""The pure state machine: tables, commands, queries, snapshots. No clock, no randomness, no I/O."""
