"""The phase study: what differs between prefill and decode, split into numerics and content."""
