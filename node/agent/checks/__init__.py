"""Health checks: *probes* that look once and say what they saw, and the *runner* that repeats one of them."""
