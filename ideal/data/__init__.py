"""From rows to tokenised examples and micro-batches."""
