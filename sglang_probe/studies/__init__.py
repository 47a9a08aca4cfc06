"""Studies: a folder each, from the YAML to the report. `base.py` says what a study is, `catalogue.py` lists them."""
