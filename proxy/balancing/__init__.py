"""What the balancer and the routing of calls are made of. Pure: clock and randomness are handed in."""
