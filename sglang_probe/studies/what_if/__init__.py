"""`sglang-probe what-if`: the recorded requests against SGLang's own tree under other settings."""
