"""The run directory: what it is, and reading it. Needs neither SGLang nor a GPU."""
