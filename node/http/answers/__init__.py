"""Consul's JSON forms of answers, where they are no model type as it stands. `/v1/openapi.json` is made from these.

A field that is only there sometimes is `NotRequired`; one that is not named here is not sent. The functions that make
the answers are typed with them, so that neither can change without the other.
"""
