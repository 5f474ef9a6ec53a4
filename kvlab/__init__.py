"""kvlab: a KV cache is a value."""
