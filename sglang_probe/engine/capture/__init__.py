"""Captured rows: taps' buffers, the writer, the reader."""
