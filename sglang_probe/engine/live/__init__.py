"""Recording a live server: totals, segments, metrics, privacy, provenance.

Imports no SGLang; `engine/hooks/instruments/live.py` does.
"""
