"""What each of a sidecar's metrics is, for whoever reads them: the text of its ``HELP`` line.

Names and units are Prometheus': counters end in ``_total``, times are in seconds, sizes in bytes. Pairs of services
are labelled ``direction``, ``source``, ``destination``; ``direction`` says whether this sidecar is the destination's
(``inbound``) or the caller's (``outbound``).
"""

from __future__ import annotations

from typing import Final

HELP: Final = {
    "lictor_access_log_dropped_total": "Lines of the access log that were dropped because they could not be written.",
    "lictor_app_received_bytes_total": "Bytes received from the app on connections that have ended.",
    "lictor_app_sent_bytes_total": "Bytes sent to the app on connections that have ended.",
    "lictor_buffer_overruns_total": "Streams and requests dropped because the sidecar held too much.",
    "lictor_buffered_bytes": "Bytes held for ends that do not take them, and of HTTP heads that are not whole.",
    "lictor_certificate_expiry_seconds": "Unix time at which the sidecar's certificate expires.",
    "lictor_certificate_issued_seconds": "Unix time from which the sidecar's certificate holds.",
    "lictor_connections_active": "Connections between two services that are open.",
    "lictor_connections_total": "Connections between two services that were begun.",
    "lictor_cut_total": "Connections and sessions ended because they are no longer allowed, by reason.",
    "lictor_ejections_total": "Times that an instance was left out because calls to it failed.",
    "lictor_grpc_calls_total": "gRPC calls that have ended, by method, gRPC status and who answered.",
    "lictor_handshake_failures_total": "TLS handshakes between two services that failed, by cause. The source of an"
    " inbound one is empty where no certificate was verified.",
    "lictor_handshakes_total": "TLS handshakes that succeeded, by whether a session was resumed.",
    "lictor_http_request_seconds": "Time that HTTP requests took.",
    "lictor_http_requests_total": "HTTP requests that have ended, by method, status code and who answered.",
    "lictor_ready": "Whether calls can be taken and made: 1 or 0.",
    "lictor_refusals_received_total": "Calls that an instance's sidecar refused, by reason.",
    "lictor_refused_total": "Connections and calls that this sidecar refused, by reason.",
    "lictor_retries_total": "Calls that were tried again at another instance.",
    "lictor_sessions": "TLS sessions to other sidecars that are open.",
    "lictor_sessions_opened_total": "TLS sessions to other sidecars that were opened.",
    "lictor_spans_dropped_total": "Trace spans that no collector has taken, by the reason.",
    "lictor_spans_exported_total": "Trace spans that a collector has taken.",
    "lictor_worker_restarts_total": "Worker processes that were replaced.",
    "lictor_workers": "Worker processes that serve.",
}
"""By the metric's name; a histogram's without ``_bucket``, ``_sum`` and ``_count``."""
