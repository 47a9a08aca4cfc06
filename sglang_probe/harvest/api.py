"""Recording from Python: `record` for one run, `Experiment` for several that share engines.

SGLang starts its processes anew from the script that uses it, so a script needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import HarvestConfig, Recording, WorkloadRecording
from sglang_probe.harvest.experiment import RunSpec, record_job
from sglang_probe.harvest.experiment import record as record_specs
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.kept_requests import KeptRequest, requests_of
from sglang_probe.harvest.model import resolve_model
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.harvest.progress import Reporter
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import expand
from sglang_probe.run.run import Run
from sglang_probe.workload.build import Workload, WorkloadConfig, iter_requests
from sglang_probe.workload.render import Renderer
from sglang_probe.workload.request import Conversation, Request, Segment, SegmentSpan

Prompt = str | Sequence[int]
"""Text, or token ids."""


class Experiment:
    """One model and its requests, recorded as often as wanted. Engines are kept as long as the next run can use them:
    use it as a context manager, or `close` it.

        with Experiment(model="probe-text", prompts=["import json"], asks={"force"}) as experiment:
            first = experiment.record("runs/first")
            again = experiment.record("runs/again", outputs_of=first, arm={"cache": "off"})

    Args:
        model: a name of `sglang-probe model list`, a local path, or a hub id.
        workload: as in the YAML, e.g. `{"source": "jsonl", "path": "requests.jsonl"}`; or `prompts`, or `requests`.
        prompts: texts, which the tokenizer encodes as they are (no chat template), or token ids.
        requests: with ids, families, segments and sampling parameters of their own.
        arms: for `run`: policies by name.
        hook_points: what is captured; `blocks.*.attn.hook_v` is that of every layer, `blocks.{4..12}.` of some.
        asks: fields of `Ask` that the engine must honour for later runs (`force` for `outputs_of`, `evict` for `kept`);
            without them it is started again when a run needs more.
        reporter: told of the progress, e.g. `sglang_probe.harvest.progress.Terminal`.
        options: everything else that a YAML may say of a recording: `dtype`, `sampling`, `rows`, `telemetry`, `server`,
            `concurrency`, `order`, `checkpoint_seconds`, `certificate`.

    Raises:
        ProbeError: a child of it for every kind of bad input; nothing was started then.
    """

    def __init__(
        self,
        *,
        model: str = "probe-text",
        workload: Mapping[str, Any] | WorkloadConfig | None = None,
        prompts: Sequence[Prompt] | None = None,
        requests: Sequence[Request | KeptRequest] | None = None,
        arms: Mapping[str, Arm | Mapping[str, Any]] | None = None,
        hook_points: Sequence[str] | None = None,
        asks: Collection[str] = (),
        reporter: Reporter | None = None,
        **options: Any,
    ) -> None:
        if sum(given is not None for given in (workload, prompts, requests)) != 1:
            raise ConfigError("give one of `workload`, `prompts` and `requests`")
        if isinstance(prompts, str):
            raise ConfigError("`prompts` is a list of prompts, not one text", fix="give `prompts=[text]`")
        if unknown := sorted(set(asks) - set(Ask.model_fields)):
            raise ConfigError(f"asks: `{unknown[0]}` is no field of `Ask`", fix=f"one of {', '.join(Ask.model_fields)}")
        found = resolve_model(model)
        if hook_points is not None:
            options["hook_points"] = list(hook_points)
        options["model"] = model
        config: Recording
        made: Workload | None = None
        if workload is not None:
            config = parse_config({"workload": workload, **options}, WorkloadRecording, where="record")
        else:
            config = parse_config(options, Recording, where="record")
            texts = any(isinstance(p, str) for p in prompts or ())
            renderer = Renderer(found.tokenizer) if texts else None
            given = _of_requests(requests or (), config.sampling)
            if prompts is not None:
                given = _of_prompts(prompts, renderer, config.sampling)
            made = Workload(tuple(given), made_from={} if renderer is None else renderer.made_from())
        self.arms = {name: _arm(arm) for name, arm in (arms or {}).items()}
        self.prepared: Prepared = prepare(config, self.arms, workload=made, kept_later=True)
        self.asks = frozenset(asks)
        self._reporter = reporter

    @cached_property
    def _host(self) -> EngineHost:
        return EngineHost()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the engine, if there is one."""
        self._host.stop()

    @property
    def requests(self) -> tuple[Request, ...]:
        """What is served."""
        return self.prepared.workload.requests

    def record(
        self,
        output: str | Path,
        *,
        requests: Sequence[Request | KeptRequest] | None = None,
        arm: Arm | Mapping[str, Any] | None = None,
        hook_points: Sequence[str] | None = None,
        kept: Mapping[str, Kept] | str | Path | None = None,
        outputs_of: Run | None = None,
        order_seed: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> Run:
        """Record one run into the directory `output`.

        Args:
            requests: in place of the experiment's own.
            arm: how SGLang is used, e.g. `{"cache": "off"}`; None: as it is.
            hook_points: in place of the experiment's own.
            kept: kept sets by request id: those requests decode from a compressed cache (`[1, layers, kv heads,
                positions]`, see `KeptSet`). Or a file of kept sets, whose keys requests name themselves.
            outputs_of: a run of the same requests, whose output tokens are decoded here in place of sampled ones.
            order_seed: shuffle the order of submission.
            overwrite, resume: what to do if `output` exists: replace it; or keep it if it is this run, and finish it if
                it is not complete.

        Raises:
            ConfigError: a request asks for what it cannot have.
            RunDirectoryError: `output` exists, or is another run.
            ProbeError: SGLang refused a request, or the recording failed.
        """
        path = Path(output)
        served = self.requests if requests is None else tuple(_of_requests(requests, self.prepared.config.sampling))
        sets: KeptFile | None = None
        if isinstance(kept, Mapping):
            sets = _file_of(kept)
            served = tuple(_keeping(served, kept))
        elif kept is not None:
            sets = KeptFile(Path(kept))
        points = None if hook_points is None else expand(hook_points, self.prepared.model.layers)
        job = job_of(
            self.prepared,
            path.name,
            served,
            arm=Arm() if arm is None else _arm(arm),
            hook_points=points,
            outputs_of=outputs_of,
            kept=sets,
            order_seed=order_seed,
        )
        again: Any = {"overwrite": overwrite, "resume": resume, "reporter": self._reporter}
        return record_job(job, path, self._host, asks=self.asks, **again)

    def run(
        self, folder: str | Path, *, force_outputs: bool = True, overwrite: bool = False, resume: bool = False
    ) -> dict[str, Run]:
        """Record every arm into a directory of its name in `folder`.

        Args:
            force_outputs: the first arm samples its outputs and the others decode the same tokens; False: every arm
                samples its own.

        Raises:
            ConfigError: there are no arms.
            ProbeError: as `record`.
        """
        if not self.arms:
            raise ConfigError("there are no `arms` to run", fix='give e.g. `arms={"on": {}, "off": {"cache": "off"}}`')
        first = next(iter(self.arms))
        specs = [
            RunSpec(name, self.requests, arm, outputs_of=first if force_outputs and name != first else None)
            for name, arm in self.arms.items()
        ]
        again: Any = {"overwrite": overwrite, "resume": resume, "reporter": self._reporter}
        return record_specs(specs, self.prepared, Path(folder), asks=self.asks, host=self._host, **again)


def record(
    output: str | Path,
    *,
    model: str = "probe-text",
    workload: Mapping[str, Any] | WorkloadConfig | None = None,
    prompts: Sequence[Prompt] | None = None,
    requests: Sequence[Request | KeptRequest] | None = None,
    arm: Arm | Mapping[str, Any] | None = None,
    hook_points: Sequence[str] | None = None,
    kept: Mapping[str, Kept] | str | Path | None = None,
    outputs_of: Run | None = None,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Run:
    """Start an engine, serve the requests, and write the run directory `output`.

    Args: as `Experiment` and `Experiment.record`; `order` is `families`, as that of `sglang-probe harvest`.

    Raises:
        ProbeError: as these.
    """
    arms = {} if arm is None else {"arm": arm}
    sources: Any = {"workload": workload, "prompts": prompts, "requests": requests}
    options.setdefault("order", HarvestConfig.model_fields["order"].default)
    with Experiment(
        model=model, arms=arms, hook_points=hook_points, reporter=reporter, **sources, **options
    ) as experiment:
        return experiment.record(output, arm=arm, kept=kept, outputs_of=outputs_of, overwrite=overwrite, resume=resume)


def _arm(given: Arm | Mapping[str, Any]) -> Arm:
    return given if isinstance(given, Arm) else parse_config(dict(given), Arm, where="arm")


def _of_prompts(prompts: Sequence[Prompt], renderer: Renderer | None, sampling: Mapping[str, Any]) -> Iterable[Request]:
    texts = (Conversation((Segment("prompt", p),)) for p in prompts if isinstance(p, str))
    rendered = iter(()) if renderer is None else iter_requests(texts, renderer, sampling)
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            yield replace(next(rendered), index=i, rid=f"r{i:06d}")
        else:
            ids = tuple(int(t) for t in prompt)
            yield Request(i, f"r{i:06d}", ids, (SegmentSpan("prompt", 0, len(ids)),), None, dict(sampling))


def _of_requests(given: Sequence[Request | KeptRequest], sampling: Mapping[str, Any]) -> Iterable[Request]:
    for i, request in enumerate(given):
        if isinstance(request, KeptRequest):
            request = requests_of([request], sampling)[0]
        yield request if request.index == i else replace(request, index=i)


def _keeping(requests: Iterable[Request], kept: Mapping[str, Kept]) -> Iterable[Request]:
    """The requests, each with the kept set of its id.

    Raises:
        ConfigError: a set is nobody's.
    """
    left = set(kept)
    for r in requests:
        left.discard(r.rid)
        yield replace(r, sampling_params=Ask(evict=r.rid).into(r.sampling_params)) if r.rid in kept else r
    if left:
        raise ConfigError(f"`kept` has a set for `{min(left)}`, and there is no request of that id")


def _file_of(kept: Mapping[str, Kept]) -> KeptFile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.safetensors"
        write_kept(path, kept)
        return KeptFile(path)
