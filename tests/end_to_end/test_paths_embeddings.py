"""A request whose tokens SGLang makes up. See docs/evidence/paths.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import ask, recorded, spans

pytestmark = pytest.mark.engine


@pytest.mark.slow
def test_a_prompt_of_embeddings_has_positions_and_no_tokens(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--disable-radix-cache", privacy="ids")
    try:
        server.wait_until_ready()
        ask(server, input_embeds=[[0.01] * 256] * 20, rid="embeds")
        ask(server, input_ids=[5] * 20, rid="ids")
        run = recorded(server)
    finally:
        server.kill()
    assert spans(run, "embeds") == spans(run, "ids") == ["0-20 prefill", "20-23 decode"]
    tokens = run.tokens().set_index("rid")["token_id"]
    assert set(tokens["embeds"][:20]) == {-1}  # SGLang's own list says 1, which nobody asked for
    assert set(tokens["ids"][:20]) == {5}
