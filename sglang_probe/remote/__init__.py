"""Copies of runs in object stores and on other file systems, through fsspec; no engine, no torch."""
