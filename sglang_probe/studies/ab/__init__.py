"""Arms over the same requests: effect beside floor, and what a cached harvest loses."""
