"""Coverage: which share of the traffic a harvest computed, by class of token.

`study_coverage` is the study (study.py); `Study` has its passes. A position's activation exists in a run where it was
computed; classes that the cache serves are under-sampled in the rows. `prompts.py` has the short form over the frames
of `Run.tokens()` that the paired study uses.
"""
