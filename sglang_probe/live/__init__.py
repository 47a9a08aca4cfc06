"""Recording a live server: rotating segments, totals, privacy, provenance. Imports no SGLang; `hooks/live.py` does."""
