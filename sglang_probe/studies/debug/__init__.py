"""Why a wrong answer and not the right one: features that support either, and the test by ablation."""
