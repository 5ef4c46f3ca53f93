"""What a user decides, read from a file and checked."""
