"""Connect's certificate authority: it gives services their identities.

`policy` decides whether a request for a leaf is granted (pure), `signing` makes certificates (pure but for the
randomness of keys and signatures), `sealing` keeps the root's key unreadable in the log, `authority` is the part
that lives on the leader: it makes the first root, signs, and rotates.
"""
