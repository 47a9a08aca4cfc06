"""Personal data in recorded text: found by patterns, and withheld by position."""
