"""What a reader must know before reading cosines of queries, in words."""

TAUTOLOGIES = (
    "**What is true by construction.** Rotating two queries by the same angle does not change their cosine: at equal "
    "positions the post-RoPE cosine equals the pre-RoPE one, and reporting both adds nothing. Queries that are some "
    "positions apart lose post-RoPE cosine with no change of content at all; `rotation alone` is that loss, computed "
    "from each query's own energies, and a curve that follows it says nothing about content. Raw queries share a mean, "
    "so that unrelated ones have a high cosine: only the centred one can be near zero. A cell that compares the true "
    "continuation with itself (SC&SP in DapQ's tables) is 1 because it is an identity."
)
