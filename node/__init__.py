"""The agent process of a host. A *server* holds a replica; a *client* speaks to servers by RPC; both
serve Consul's HTTP API, run health checks for local services and keep the catalog true to them."""
