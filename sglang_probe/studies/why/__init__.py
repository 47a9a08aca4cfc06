"""`sglang-probe why`: why each prompt token was computed and not reused, and what would save it."""
