"""RPC between nodes: requests, streams and their errors, multiplexed over one mutually authenticated TLS connection.

A *call* is one request and its answer: a value, an error, or a *stream* of items that ends or is cancelled. An
*upload* is a call whose body arrives in pieces. `frames` is the wire form, `connection` one connection seen from
either end, `server` and `client` what each end does with it, `listener` the port shared with raft.
"""
