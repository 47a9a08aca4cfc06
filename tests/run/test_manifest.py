"""What a manifest never holds."""

from __future__ import annotations

from sglang_probe.run.manifest import without_secrets


def test_keys_and_passwords_are_not_in_a_manifest() -> None:
    secret = {"api_key": "a", "admin_api_key": "b", "ssl_keyfile_password": "c", "watermark_key_b": "d"}
    told = {"page_size": 16, "tokenizer_path": "x", "max_total_tokens": 4096, "ssl_keyfile": "/k", "api_key": None}
    assert without_secrets({**secret}) == dict.fromkeys(secret, "(secret)")
    assert without_secrets(told) == told
