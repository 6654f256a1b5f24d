"""The data plane. A *sidecar* stands beside one service instance, accepts plain connections on its
*upstream listeners* and mutual TLS on its *public listener*, and is fed by one stream of configuration."""
