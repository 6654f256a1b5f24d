"""The demo's two apps, twins of ``examples/echo-server`` and ``examples/echo-client``; they know nothing of us."""
