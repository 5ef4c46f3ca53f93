"""The experiment service: the method's steps as recorded stages on a Ray cluster. Start at ``driver``."""
