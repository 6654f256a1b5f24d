"""Many app connections as streams over one TLS session between two Lictor sidecars (ALPN ``lictor-mux/1``).

frame    the unit on the wire: an 8-byte header and a payload (:mod:`proxy.mux.frames`)
stream   one app connection: opened by the dialing side, accepted or refused by the other, ended in each direction
credit   how many bytes a side may still send on a stream (:mod:`proxy.mux.flow`)
core     a session's logic without I/O (:mod:`proxy.mux.core`)
session  the core on an asyncio transport (:mod:`proxy.mux.session`)

The framing follows the published yamux specification in spirit (stream windows, half-close, go-away, ping) and
adds accept and refuse, so that a stream that was not admitted can be tried on another instance.
"""

ALPN = "lictor-mux/1"
