"""`python -m sglang_probe` is the command line."""

from sglang_probe.cli import main

if __name__ == "__main__":
    main()
