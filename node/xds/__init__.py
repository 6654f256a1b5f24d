"""Envoy as a sidecar: this node's xDS server, which turns a sidecar's configuration stream into Envoy's resources.

The core is pure: :mod:`~node.xds.snapshot` merges updates, :mod:`~node.xds.resources` (with ``listeners``,
``clusters``, ``rbac``, ``permissions``) compiles them into dicts in Envoy's JSON form, :mod:`~node.xds.delta` decides
what a subscriber must be sent. :mod:`~node.xds.messages` and :mod:`~node.xds.server` are the gRPC around it; they
need the extra ``lictor[envoy]`` and are loaded when the first Envoy comes to :mod:`~node.xds.door`.
"""
