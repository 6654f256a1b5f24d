"""Types that several packages speak: service instance, check, intention, SPIFFE id, roots, sidecar
configuration. Values only: no I/O, no clock, no behaviour beyond parsing and naming."""
