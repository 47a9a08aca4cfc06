"""Every touch of SGLang's code: one file per subject. `install` is the only door in."""
