"""A stage that happened is never done again."""
