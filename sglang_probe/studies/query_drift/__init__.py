"""Query drift: how decode queries differ from the prompt queries that eviction methods score with.

Pure functions on captured queries, each beside its null. Shapes: N window or prompt queries, T decode queries, H query
heads, D head dim; results are `[..., T, H]` or `[..., H]`. "pre" is before RoPE and after q-norm, "post" after RoPE.
"""
