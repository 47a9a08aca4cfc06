"""Everything that runs inside SGLang's processes."""
