"""Is what a running server reuses right? The same requests cold and warm through its public API, and a verdict.

Needs neither SGLang nor torch: it runs where nothing but this package is installed, against a server that is elsewhere.
client.py asks, prompts.py says what, arms.py sends every arm, judge.py compares and gives the verdict, page.py draws.
"""
