"""The ``lictor`` command. Everything but ``agent`` and ``cluster`` speaks the public HTTP API only."""
