"""The method: how a domain's volume moves the loss on small reference sets, and what to do about it.

Usable from a notebook with no cluster. Read in this order: ``config``, ``domains``, ``mixture``, ``training``,
``curvature``, ``influence``, ``equilibrium``.
"""
