"""Statistics: small functions, each with the source of its formula. Needs neither SGLang nor torch."""
