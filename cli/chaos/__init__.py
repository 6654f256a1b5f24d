"""Chaos runs: real processes under real faults, and a check of the recorded history.

Nouns: an *operation* is one call by one client, with the times of its invocation and its return; a *history* is all
operations of a run; a *fault* is what was done to the cluster meanwhile; a *verdict* says whether some order of the
operations, compatible with their times, explains every answer (Herlihy & Wing, 1990).
"""
