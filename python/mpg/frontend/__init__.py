"""What callers say, in words of their own or of transformers, made into requests."""
