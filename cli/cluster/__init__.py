"""A cluster on one machine: each node a process of its own, with its data, log and pid file under one directory.

DIR/cluster.toml    what runs: written once, then the user's
DIR/tls/            node certificates
DIR/data/NODE/      a node's journal, snapshots, registrations
DIR/logs/NODE.log   what it printed
DIR/run/NODE.pid    its process
"""
