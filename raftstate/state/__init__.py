"""The pure state machine: tables, commands, queries, snapshots. No clock, no randomness, no I/O.

A *command* is written through the log and *applied* to the *store*; what it changed is told as *watch keys*. A
*query* reads the store and says under which watch keys its answer can change. A *refusal* is a command's outcome
without effect.
"""
