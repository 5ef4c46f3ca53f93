"""How sure is it: intervals, what hangs on the reference sets, and what influence is worth."""
