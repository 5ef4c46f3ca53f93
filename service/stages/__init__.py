"""Each step of a run: what it depends on, what it does, what it leaves."""
