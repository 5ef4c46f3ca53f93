"""Where the base model comes from, its adapters, and the arithmetic that suits the machine."""
