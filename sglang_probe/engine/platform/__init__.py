"""The CPU reference platform: stock SGLang on a machine without an accelerator."""
