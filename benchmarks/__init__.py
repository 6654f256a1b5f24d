"""Measurements against peers in the same run; figures are ratios, never assertions in tests."""
