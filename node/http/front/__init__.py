"""The HTTP listener: plain requests are served here at little cost, everything else by aiohttp's own protocol."""
