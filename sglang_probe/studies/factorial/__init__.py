"""Content by position: what pseudo queries say of the real decoding."""
