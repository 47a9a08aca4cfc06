"""What the segment holds: positions, and the residual stream of a request that was mostly served from the cache."""

import sglang_probe

run = sglang_probe.load_run("runs/live/segment-00000")
tokens = run.tokens()  # a pandas frame, one row per position of every request
print(tokens["status"].value_counts().to_string(), "\n")
columns = ["position", "token_id", "status", "phase", "forward_id", "row", "source_row"]

requests = run.requests()
rid = requests["rid"][requests["cached_tokens"].idxmax()]
mine = tokens[tokens["rid"] == rid]
print(mine[columns].iloc[[0, 1, -2, -1]].to_string(index=False), "\n")

x = run.activations(rid, "blocks.2.hook_resid_post")  # every position; reused ones from the request that computed them
print(tuple(x.shape), x.dtype)
