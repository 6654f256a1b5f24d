"""The replicated state of a Lictor cluster.

Nouns: a *command* is one requested change; the *state machine* applies commands in log order and is
pure; the *journal* keeps the log durable; a *replica* is one server's raft node with its journal and
its state machine; a *snapshot* is the state at one log index.
"""
