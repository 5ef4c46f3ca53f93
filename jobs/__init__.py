"""Entry points for ``ray job submit``, and the configs they run."""
