"""The agent's own side of a node: *local services* and *checks* (persisted, run here), *anti-entropy* that keeps
the catalog true to them, *views* of the catalog kept current by streams, *leaves* whose keys are made here, and
the configuration streams of the sidecars on this host."""
