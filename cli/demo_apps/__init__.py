"""The demo's two apps, twins of ``examples/echo-server`` and ``examples/echo-client``. They know nothing of Lictor."""
