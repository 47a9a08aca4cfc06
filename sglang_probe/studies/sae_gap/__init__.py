"""What an SAE loses between human text, the model's own text, and decoding; and what its errors do to the model."""
