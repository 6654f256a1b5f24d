"""Consul's v1 HTTP API over a Backend and a LocalAgent: one module per endpoint family, rules shared by all of them
in ``options`` (query parameters), ``respond`` (bodies and headers), ``errors`` and ``middleware``."""
