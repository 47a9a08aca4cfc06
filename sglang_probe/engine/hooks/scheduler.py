"""Launch, commit and finish of forward passes, read from the scheduler's host lists.

SGLang: `managers/scheduler.py` (`run_event_loop`, `run_batch`, `process_batch_result`), `managers/schedule_batch.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments import live as live_server
from sglang_probe.engine.hooks.instruments.labels import labels_of
from sglang_probe.engine.hooks.instruments.steer import Steering, steering_of_session
from sglang_probe.engine.hooks.requests import ask_of, asks_of
from sglang_probe.engine.hooks.supported import refuse_unsupported
from sglang_probe.engine.hooks.tree import matched, refuse_beside_rows, refuse_latent, refuse_other_trees
from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.releases import release
from sglang_probe.errors import LedgerError, UnsupportedError
from sglang_probe.run import schema

logger = logging.getLogger("sglang_probe")


def scheduler_init(_result: None, scheduler: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `Scheduler.__init__`: refuse what is not handled, then start recording."""
    from sglang.srt.runtime_context import get_parallel

    refuse_unsupported(server_args)
    refuse_other_trees(scheduler.tree_cache)
    refuse_latent(scheduler.model_config)
    refuse_beside_rows(scheduler.tree_cache, guard.active().config)
    if scheduler.model_config.is_multimodal:
        raise UnsupportedError(
            "the accounting is not proved for multimodal models, whose prompts hold positions without a token",
            fix="use a text model, or run without the probe",
        )
    session = guard.active()
    if session.fault is not None:  # while graphs were captured
        raise UnsupportedError(session.fault, fix="remove `hook_points` to record the ledger alone")
    session.attach(
        scheduler,
        server_args,
        dp_rank=session.config.replica + release().dp_rank(scheduler),
        tp_size=get_parallel().tp_size,
        # Every tensor-parallel rank sees the same requests and plans; the first records them.
        records=get_parallel().tp_rank == 0,
    )
    if session.records and session.config.live is not None:
        session.set_policy()
        session.live = live_server.start(session.config, server_args, session.dp_rank, session.in_force())
    session.open()


def run_event_loop(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Scheduler.run_event_loop`: it returns once the engine was told to end and requests have drained, and
    raises if the scheduler crashes, which ends the engine."""
    try:
        value = original(scheduler, *args, **kwargs)
    except BaseException as e:
        _ended(e)
        raise
    _ended(None)
    return value


def _ended(error: BaseException | None) -> None:
    if guard.session is None:
        return
    try:  # not guarded: a recording that has stopped wants to be closed too
        if error is not None:
            guard.session.crashed(error)
        elif guard.session.live is not None:
            guard.session.close()
    except Exception:
        logger.exception("sglang-probe could not close the recording")


def run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Scheduler.run_batch`: note the plan before the forward runs."""
    _launch(scheduler, batch)
    try:
        result = original(scheduler, batch, *args, **kwargs)
    finally:
        _over()
    _launched(result)
    return result


def process_batch_result(
    original: Callable[..., Any], scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `Scheduler.process_batch_result`: commit the forward after the engine has processed its result."""
    # Requests are told apart as objects: two clients may use one id at the same time.
    finished_before = {id(r) for r in batch.reqs if r.finished()}
    retracted = [r for r in batch.reqs if r.is_retracted]
    value = original(scheduler, batch, result, *args, **kwargs)
    _commit(batch, result, finished_before, retracted)
    return value


def make_abort_req(_result: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER what the scheduler calls for every request that it drops outside a forward's result (`abort_hooks`):
    waiting, in the middle of its prompt, or retracted for good."""
    _aborted(req)


@guard.guarded
def _aborted(req: Any) -> None:
    recorder = guard.active().recorder
    assert recorder is not None
    if live_server.began_before(req):
        return  # with the recording that stopped, which has told what became of it
    (end,) = live_server.ending([req], ends_of([req], reason="abort"))
    recorder.abort(end)
    _forget([end])


def _launch(scheduler: Any, batch: Any) -> None:
    session = guard.session
    if session is None:
        return
    if session.live is not None:
        try:
            session.follow()
            if session.recorder is None:
                for ask in asks_of(live_server.served_unrecorded(batch.reqs)):
                    if ask.rows is not None and session.live.answers is not None:
                        session.live.answers.unrecorded(ask.rows)
        except Exception as e:
            session.fail("follow", e)
    _launch_recorded(scheduler, batch)
    if session.recorder is None and (steering := steering_of_session()) is not None:
        _go_on(steering, batch)


def _go_on(steering: Steering, batch: Any) -> None:
    """Nothing is recorded any more, and what requests were promised is done all the same."""
    try:
        starts, ends, _ = _positions(batch)
        steering.prepare(batch.reqs, starts, ends)
    except Exception as e:
        steering.broken(e)
        logger.exception("sglang-probe could not intervene")


def _over() -> None:
    if (steering := steering_of_session()) is not None:
        steering.over()


@guard.guarded
def _launch_recorded(scheduler: Any, batch: Any) -> None:
    session = guard.active()
    session.forget_forward()
    if batch.reqs:
        plan = plan_of(batch, tag=scheduler.forward_ct + 1, waiting=len(scheduler.waiting_queue))
        plan.unaccounted = unexplained(batch.reqs, plan)
        if plan.unaccounted is not None and session.live is None:
            raise LedgerError(plan.unaccounted)
        session.launch(batch.reqs, plan)


@guard.guarded
def _launched(result: Any) -> None:
    guard.active().launched(replayed=bool(result.can_run_cuda_graph))


@guard.guarded
def _commit(batch: Any, result: Any, finished_before: set[int], retracted: list[Any]) -> None:
    if not batch.reqs:
        return
    finished = [r for r in batch.reqs if r.finished() and id(r) not in finished_before]
    finished = [r for r in finished if not live_server.began_before(r)]
    ended = live_server.ending(finished, ends_of(finished))
    recorder = guard.active().recorder
    assert recorder is not None
    recorder.commit(
        batch.forward_iter,
        graph=bool(result.can_run_cuda_graph),
        ended=ended,
        retracted={live_server.name_of(r) for r in retracted if not live_server.began_before(r)},
    )
    _forget(ended)


def _forget(ended: list[RequestEnd]) -> None:
    for end in ended:
        guard.active().end(end.rid)


def unexplained(reqs: list[Any], plan: ForwardPlan) -> str | None:
    """Why a forward cannot be accounted for: it computes more than the scheduler's lists say, such as rows of beams."""
    beams = [r.rid for r in reqs if release().in_beam(r)]
    if beams:
        return f"request {beams[0]:.200} asks for beam search, whose rows have no position of their own"
    if plan.tokens != plan.slots:
        return (
            f"SGLang allocated {plan.slots} KV slots for a forward pass of {plan.tokens} positions "
            f"(of {', '.join(plan.rids[:3]):.600})"
        )
    return None


def plan_of(batch: Any, *, tag: int, waiting: int) -> ForwardPlan:
    """The positions that a `ScheduleBatch` is about to compute, from host integers only.

    Extend: `prefix_lens[i] .. prefix_lens[i] + extend_lens[i]`. Decode: the one position that `prepare_for_decode`
    has just reserved, `committed_len - 1`; `len(output_ids)` would lag one step under overlap scheduling. Mixed:
    the extend lists, in which decode rows follow the prefill rows (`mix_with_running`).
    """
    reqs = batch.reqs
    rids, began_before = live_server.names_of(reqs)
    starts, ends, decoding = _positions(batch)
    return ForwardPlan(
        tag=tag,
        mode="decode" if batch.forward_mode.is_decode() else "mixed" if batch.forward_mode.is_mixed() else "extend",
        rids=rids,
        starts=starts,
        ends=ends,
        decoding=decoding,
        attempts=[r.retraction_count for r in reqs],
        prompt_lens=[len(r.origin_input_ids) for r in reqs],
        contexts=[None if d else context_of(r) for r, d in zip(reqs, decoding, strict=True)],
        slots=batch.out_cache_loc.shape[0],
        waiting=waiting,
        began_before=began_before,
    )


def _positions(batch: Any) -> tuple[list[int], list[int], list[bool]]:
    """Of each request, the positions `[start, end)` of the coming forward, and whether it is decoding."""
    reqs = batch.reqs
    if batch.forward_mode.is_decode():
        starts = [release().committed_len(r) - 1 for r in reqs]
        return starts, [s + 1 for s in starts], [True] * len(reqs)
    starts = list(batch.prefix_lens)
    ends = [s + n for s, n in zip(starts, batch.extend_lens, strict=True)]
    prefills = len(reqs) - (len(batch.decoding_reqs) if batch.forward_mode.is_mixed() else 0)
    return starts, ends, [False] * prefills + [True] * (len(reqs) - prefills)


def context_of(req: Any) -> Context:
    """What identifies a request's prefix in the radix tree (`RadixKey`)."""
    labels = labels_of(ask_of(req), req)
    return Context(req.full_untruncated_fill_ids, release().namespace(req), matched(req), labels)


def _replaced(req: Any) -> bool:
    """Whether SGLang refused the request and ran one token in the place of its prompt (`Req.set_finish_with_abort`)."""
    return len(req.origin_input_ids) == 1 and req.origin_input_ids != req.origin_input_ids_unpadded


def ends_of(reqs: list[Any], reason: str | None = None) -> list[RequestEnd]:
    """What the engine says of finished requests. On a live server one that cannot be read costs its own record only."""
    ends = []
    for req in reqs:
        try:
            ends.append(end_of(req, reason))
        except Exception:
            if guard.active().live is None:
                raise
            guard.logger.exception("sglang-probe could not read how request %.200s ended", req.rid)
            ends.append(RequestEnd(req.rid, len(req.origin_input_ids), 0, 0, 0, schema.UNACCOUNTED, []))
    return ends


def end_of(req: Any, reason: str | None = None) -> RequestEnd:
    """What the engine says of a finished `Req`; `reason` for one that was dropped without a finish reason."""
    return RequestEnd(
        rid=req.rid,
        prompt_len=len(req.origin_input_ids),
        output_len=len(req.output_ids),
        cached_tokens=req.cached_tokens,
        retractions=req.retraction_count,
        # Refused first: one that its client dropped before its one token ran is not the prompt that was asked either.
        finish_reason=schema.REFUSED if _replaced(req) else reason or req.finished_reason.to_json()["type"],
        output_ids=req.output_ids.tolist(),
    )
