"""One build: the steps of a recipe, whether each is done, and how to run it. dodo.py and cli.py are faces of this.

The store's truth decides. A step's key is known once the outputs of the steps it needs are; a step is done when the
store holds the action of that key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from furiosa_build import __version__
from furiosa_build.artifact import writer
from furiosa_build.artifact.schema import MANIFEST_FILE, FileRecord, Manifest
from furiosa_build.backends.base import check_options
from furiosa_build.backends.registry import get_backend
from furiosa_build.build.executors.local import Pool
from furiosa_build.core.cancellation import CancellationToken, Cancelled, cancelled_by
from furiosa_build.core.errors import PreflightError, StepError, UserError
from furiosa_build.core.events import Emitter, Listener, SurveyStarted
from furiosa_build.core.failpoints import doing
from furiosa_build.core.peak_memory import Watch
from furiosa_build.core.progress import metered
from furiosa_build.core.progress import read as read_meter
from furiosa_build.core.system import Machine, disk_of, this_machine
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.budget.costs import Places
from furiosa_build.plan.budget.describe import kv_blocks_text, lowered_text, refusal_text
from furiosa_build.plan.budget.durations import Durations, Past
from furiosa_build.plan.budget.placement import check_parallel
from furiosa_build.plan.budget.preflight import Preflight, preflight
from furiosa_build.plan.explain import Explanation, Place, explain_step
from furiosa_build.plan.keys import key_factors, key_of, tool_versions
from furiosa_build.plan.planner import DRAFT, Plan, Step, make_plan
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.quant.compressed_tensors import check_quantizes
from furiosa_build.quant.scheme import modules as scheme_modules
from furiosa_build.quant.scheme import versions as scheme_versions
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.schema import BuildOptions, Recipe, check_architecture
from furiosa_build.steps import compile, fetch, package, qualify, survey, trace
from furiosa_build.steps import registry as steps
from furiosa_build.steps.base import Inputs, Request
from furiosa_build.steps.survey import SurveyRequest
from furiosa_build.steps.trace import TraceRequest
from furiosa_build.steps.weights import WeightsRequest
from furiosa_build.store import ActionRecord, Made, Store, default_store_root
from furiosa_build.weights import listing
from furiosa_build.weights.hub import cached_bytes, hub_cache
from furiosa_build.weights.locate import cut_config
from furiosa_build.weights.sources import Sources

_USES_SCHEMES = {"quantize", "shard", "trace", "compile", "qualify"}
"""Steps that run the code of the schemes that the model's weights have."""


@dataclass(frozen=True)
class Done:
    """A finished step. `ran` tells whether this process did the work, or found it in the store."""

    record: ActionRecord
    ran: bool


class Build:
    """The build of one recipe.

    That of its draft model, if it has one, is a Build by itself with the same store and workers: so its steps are those
    of a build of that model alone. Here they are called `draft:NAME`.

    Args:
        recipe: What to build and how.
        cwd: What a relative `save_dir` is relative to.
        model: The build of the model that this is the draft for.
        listeners: Called with the events of this build.
    """

    def __init__(
        self, recipe: Recipe, cwd: Path | None = None, model: Build | None = None, listeners: Iterable[Listener] = ()
    ) -> None:
        self.events: Emitter = model.events if model else Emitter(listeners)
        self.recipe = recipe
        self.spec, self.options = recipe.spec, recipe.options
        self.cwd = cwd or Path.cwd()
        cache = self.options.cache_dir
        root = (Path(cache).expanduser() if cache else default_store_root()).absolute()
        self._prefix = "" if model is None else DRAFT
        self.store: Store = model.store if model else Store(root, self.options.verify_inputs, self.directory.parent)
        self.store.tell = self.events.note
        self._code: SourceCode = model._code if model else SourceCode(memo=root / "code.json")
        self.backend = get_backend(self.spec.backend.name)
        check_options(self.backend, self.spec.backend.compiler_config_overrides)
        self._isa = self.backend.isa(self.spec.target.isa)
        # By the name that a step has in the whole build.
        self.done: dict[str, Done] = model.done if model else {}
        self._cancellation: CancellationToken = model._cancellation if model else CancellationToken()
        self._pools: _Pools = model._pools if model else _Pools(self.options)
        self._sources = Sources(self.spec, recipe.roots, self.store.hashes)
        where = "model.architecture" if self.spec.model.architecture else "config.json"
        check_architecture(self.spec, self._sources.config, where)
        self.checkpoint = self._sources.read_checkpoint()
        self.hf_config = cut_config(self._sources.config, self.spec.model)
        _ = self._sources.param_file  # is it there?
        self.draft = self._open_draft()
        if model is not None:
            return
        writer.check_destination(self.directory)
        writer.check_is_directory(self.store.root, "cache_dir")

    @property
    def directory(self) -> Path:
        """SAVE_DIR/NAME: where the artifact's versions are."""
        return self.cwd / Path(self.options.save_dir).expanduser() / self.spec.name

    @cached_property
    def plan(self) -> Plan:
        """The steps. The first time for an architecture a worker surveys the model, which takes seconds."""
        outline = self._outline()
        check_parallel(self.spec, self.hf_config, outline)
        if self.checkpoint is not None:
            check_quantizes(self.checkpoint, outline)
        draft = None
        if self.draft is not None:
            with _of_draft(self.draft.spec.name):
                draft = self.draft.plan
        return make_plan(self.spec, self.hf_config, outline, self._isa, self.checkpoint, draft)

    @property
    def version_directory(self) -> Path:
        """Where the artifact is, once `package` is done."""
        return self.directory / writer.version_of(self._manifest().artifact_id)

    def is_done(self, name: str) -> bool:
        """Whether the step's output is in the store and, for `package` and `qualify`, in the output directory."""
        if self._find(name) is None:
            return False
        if name == "package":
            return writer.is_published(self.version_directory, self._manifest(), self.store.hashes.hash)
        if name == "qualify":
            return writer.latest_is(self.version_directory) and self._qualification_file().is_file()
        return True

    def run(self, name: str) -> Done:
        """Does the step unless the store has it, and what follows from it in the output directory.

        Raises UserError or StepError; what other steps have finished stays in the store.
        """
        build, own = self._origin(name)
        if build is not self:
            with _of_draft(build.spec.name):
                return build.run(own)
        step, full = self.plan.steps[name], self._full(name)
        with _failing(full), cancelled_by(self._cancellation), doing(full), metered(self.store.meter_path(full)):
            if full not in self.done:
                factors = self._factors(step) or self._late_factors(step)
                record, ran = self.store.obtain(key_of(factors), name, factors, self._work_of(step))
                self.done[full] = Done(record, ran)
            if name == "package":
                self._publish()
            if name == "qualify":
                self._accept()
        return self.done[full]

    def explain(self) -> Iterator[Explanation]:
        """For each step: up to date, or why not. Runs nothing."""
        for name in self.plan.steps:
            if self.is_done(name):
                yield Explanation(name, "up to date")
            elif self._find(name) is not None:
                yield Explanation(name, "to publish", self._why_not_in_place(name))
            else:
                yield self._why_not_done(name)

    def preflight(self, steps: Iterable[str] | None = None, machine: Machine | None = None) -> Preflight:
        """What is to do of `steps` (None: of all) needs, and what cannot fit. `machine`: not this one."""
        names = self.plan.steps if steps is None else steps
        undone = {name: self._why_not_done(name).state == "to do" for name in names if not self.is_done(name)}
        machine = machine or this_machine()
        return preflight(self.plan, self.options, undone, self._places(), machine, self._durations)

    def estimate_seconds(self, name: str) -> float | None:
        """How long a step will take, from earlier steps of its kind; None when there is none to compare with."""
        plan, step = self.plan.origin(self.plan.steps[name])
        return self._durations.estimate(step, plan)

    def bytes_done(self, name: str) -> tuple[int, int] | None:
        """Of a step that streams bytes and runs: how many are done, and of how many."""
        path = self.store.meter_path(name)
        return None if path is None else read_meter(path)

    def begin(self, steps: Iterable[str], machine: Machine | None = None) -> list[str]:
        """To be called before `steps` are run. Returns what a person should know.

        Raises UserError when a tool is missing, PreflightError when the steps that are to do cannot fit. Without such
        steps it asks nothing of the machine. `machine`: not this one.
        """
        steps = list(steps)
        self.check_toolchain(steps)
        undone = [name for name in steps if not self.is_done(name)]
        if not undone:
            return []
        figures = self.preflight(undone, machine)
        if figures.shortages:
            raise PreflightError(refusal_text(figures))
        notes = []
        if self.plan.kv_blocks.source == "memory" and "package" in undone:
            notes.append(f"KV cache: {kv_blocks_text(self.plan)}")
        if figures.compile_workers != self.options.num_compile_workers:
            self._pools.compilers = Pool(figures.compile_workers)
            notes.append(lowered_text(figures, self.options.num_compile_workers))
        return notes

    def check_toolchain(self, steps: Iterable[str]) -> None:
        """Raises UserError when there are programs to compile in `steps` and a tool for that is missing."""
        compiling = [name for name in steps if self.plan.steps[name].action == "compile"]
        for build in {self._origin(name)[0] for name in compiling if not self.is_done(name)}:
            build.backend.check_toolchain()

    def interrupt(self) -> None:
        """Makes the steps that run fail at once, and no other begin. For signal handlers."""
        self._pools.builders.kill()
        self._pools.compilers.kill()
        self.store.interrupt()
        self._cancellation.cancel()

    def close(self) -> None:
        """Ends the worker processes, and this process's work with the store."""
        self._pools.builders.close()
        self._pools.compilers.close()
        self.store.close()

    def _origin(self, name: str) -> tuple[Build, str]:
        """The build that does a step, and the step's name there."""
        if self.draft is None or not name.startswith(DRAFT):
            return self, name
        return self.draft, name.removeprefix(DRAFT)

    def _full(self, name: str) -> str:
        """What a step is called in the whole build."""
        return self._prefix + name

    def _find(self, name: str) -> ActionRecord | None:
        """The step's action, if its key is known and the store has it."""
        build, own = self._origin(name)
        if build is not self:
            return build._find(own)
        full = self._full(name)
        if full not in self.done:
            factors = self._factors(self.plan.steps[name])
            record = self.store.find(key_of(factors)) if factors else None
            if record is None:
                return None
            self.done[full] = Done(record, ran=False)
        return self.done[full].record

    # The draft model.

    def _open_draft(self) -> Build | None:
        if self.recipe.draft is None:
            return None
        recipe = self.recipe.draft.model_copy(update={"options": self.options})
        name = recipe.spec.name
        with _of_draft(name):
            draft = Build(recipe, self.cwd, self)
        own, found = (build.hf_config["vocab_size"] for build in (self, draft))
        if own != found:
            what = f"the draft {name!r} has a vocabulary of {found} tokens, the model of {own}"
            raise UserError(what, where="speculative.recipe", valid="a model with the same vocabulary")
        return draft

    # What a build needs, and how long it takes.

    def _places(self) -> Places:
        store = self.store.root if self.store.is_writable else self.directory.parent
        downloads, cached = None, 0
        unread = 0 if self.is_done("fetch") else self._sources.unread_bytes()
        if self._sources.directory is None and self._sources.has_weights:
            downloads, cached = disk_of(hub_cache()), cached_bytes(self.spec.model)
        draft = None if self.draft is None else self.draft._places()
        return Places(disk_of(store), disk_of(self.directory), downloads, cached, unread, draft)

    @cached_property
    def _history(self) -> list[Past]:
        """The last used first."""
        return [
            Past(record.step, record.seconds, factors, frozenset(o.sha256 for o in record.outputs.values()))
            for record, factors, _ in sorted(self.store.records(), key=lambda found: -found[2])
        ]

    @cached_property
    def _durations(self) -> Durations:
        return Durations(self._history)

    # Why a step is to do.

    def _why_not_done(self, name: str) -> Explanation:
        build, own = self._origin(name)
        if build is not self:
            found = build._why_not_done(own)
            waits_for = tuple(f"{DRAFT}{one}" if one in build.plan.steps else one for one in found.waits_for)
            return replace(found, step=name, waits_for=waits_for)
        factors, missing = self._known_factors(self.plan.steps[name])
        return explain_step(name, factors, missing, (past.factors for past in self._history if past.step == name))

    def _why_not_in_place(self, name: str) -> str:
        directory = self.version_directory
        if name == "qualify":
            missing = "latest does not point to it" if self._qualification_file().is_file() else "the figures are gone"
            return f"{directory.name} qualified before; {missing}"
        if not directory.exists():
            return f"the artifact is in the store, and not in {directory}"
        damaged = list(writer.damaged_files(directory, self._manifest(), self.store.hashes.hash))
        return f"damaged in {directory}: {', '.join(damaged[:3])}{', ...' if damaged[3:] else ''}"

    # What a step's key is made of.

    def _factors(self, step: Step) -> dict[str, Any] | None:
        """None while the output of a step that it needs is unknown."""
        factors, missing = self._known_factors(step)
        return None if missing else factors

    def _known_factors(self, step: Step) -> tuple[dict[str, Any], list[Place]]:
        """The factors that are known, and where in them something will stand that is not known yet."""
        inputs: dict[str, dict[str, str]] = {}
        missing: list[Place] = []
        for needed, pattern in step.needs.items():
            record = self._find(needed)
            if record is None:
                missing.append(("inputs", needed))
            else:
                inputs[needed] = {name: o.sha256 for name, o in record.outputs.items() if fnmatchcase(name, pattern)}
        if step.action == "fetch":
            identity = self._sources.identity()
            inputs["source"] = {name: known for name, known in identity.items() if known is not None}
            missing += [("inputs", "source", name) for name, known in identity.items() if known is None]
        return self._factors_of(step.action, step.reads, inputs), missing

    def _factors_of(
        self, action: str, reads: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        return key_factors(action, reads, inputs, self._tools(action), self._code.digests(self._modules(action)))

    def _modules(self, action: str) -> list[str]:
        """The modules of this project that the step begins with. Another package's backend has a version instead."""
        modules = [f"furiosa_build.steps.{action}"]
        if action == "qualify":
            modules.append("furiosa_build.runtime.probe")
        backend = type(self.backend).__module__
        if action in ("compile", "qualify") and backend.startswith("furiosa_build."):
            modules.append(backend)
        if action in _USES_SCHEMES:
            modules += scheme_modules(self.plan.schemes().values())
        return modules

    def _tools(self, action: str) -> Mapping[str, str]:
        schemes = self.plan.schemes().values() if action in _USES_SCHEMES else ()
        return {**self._tools_of(action), **scheme_versions(schemes)}

    def _tools_of(self, action: str) -> Mapping[str, str]:
        match action:
            case "survey" | "trace":
                return tool_versions("torch", "transformers")
            case "quantize" | "shard":
                return tool_versions("torch", "numpy")
            case "compile":
                return self.backend.key_factors()
            case "package":
                # All that had a hand in the artifact: provenance.json tells.
                own = {"furiosa_build": __version__, "python": ".".join(map(str, sys.version_info[:2]))}
                libraries = tool_versions("torch", "transformers", "numpy", "safetensors")
                return {**own, **libraries, **self.backend.key_factors()}
            case "qualify":
                return tool_versions("torch", "transformers", "numpy", "tokenizers")
        return {}

    def _late_factors(self, step: Step) -> dict[str, Any]:
        """Of a fetch whose source has to be read first."""
        if step.action != "fetch":
            raise StepError(step.name, "a step that it needs has not run")
        self._sources.read()
        factors = self._factors(step)
        if factors is None:
            raise StepError(step.name, f"the files of {self.spec.model.model_id_or_path} change while they are read")
        return factors

    # How a step's output is made.

    def _work_of(self, step: Step) -> Callable[[Path], Made]:
        match step.action:
            case "fetch":
                return _watched(self._fetch)
            case "package":
                return _watched(self._package)
            case "compile":
                return self._in_worker(step, self._pools.compilers)
            case _:
                return self._in_worker(step, self._pools.builders)

    def _in_worker(self, step: Step, pool: Pool) -> Callable[[Path], Made]:
        full, request = self._full(step.name), self._request(step)
        kind, inputs, log = steps.find(step.action), self._inputs(step, request), self.store.log_path(full)
        return lambda output: pool.run(full, kind, request, inputs, output, log)

    def _request(self, step: Step) -> Request:
        match step.action:
            case "compile":
                return self._compile_request(step)
            case "trace":
                return self._trace_request(step)
            case "qualify":
                weights = self._weights_request(step)
                inputs = {f"{qualify.WEIGHTS}{name}": sha256 for name, sha256 in weights.inputs.items()}
                return weights.model_copy(update={"inputs": inputs | self._artifact_files()})
            case _:
                return self._weights_request(step)

    def _artifact_files(self) -> dict[str, str]:
        files = {name: file.sha256 for name, file in self._manifest().files.items()}
        files[MANIFEST_FILE] = self._record("package").outputs[MANIFEST_FILE].sha256
        return {f"{qualify.ARTIFACT}{name}": sha256 for name, sha256 in files.items()}

    def _inputs(self, step: Step, request: Request) -> Inputs:
        """The files of a request on this machine. Raises UserError when one of the source is not as it was fetched."""
        source = {} if step.action in ("trace", "compile") else self._source_files()
        files = {name: source.get(sha256) or self.store.blob(sha256) for name, sha256 in request.inputs.items()}
        return Inputs(files, self.store.scratch(self.spec.backend.name))

    def _source_files(self) -> dict[str, Path]:
        """The weights that the build begins with, by sha256."""
        weights, taken = self._source(), self._sources.quantized
        if not weights.files:
            return {}
        if taken is not None:
            self._sources.check_unchanged(taken, weights.files)
            place = taken
        else:
            place = self._sources.unchanged_weights(weights.files, self._model_files().revision)
        return {file.sha256: place / name if place.is_dir() else place for name, file in weights.files.items()}

    def _fetch(self, output: Path) -> None:
        sources = self._sources
        parameters = self.plan.outline.parameters
        fetch.run(self.spec.model, self.recipe.roots, parameters, self.store.hashes.hash, output, sources.quantized)

    def _weights_request(self, step: Step) -> WeightsRequest:
        written = step.action != "quantize" and self.plan.writes_checkpoint
        source = self._source()
        files = self._record("quantize").outputs if written else source.files
        return WeightsRequest(
            inputs={name: file.sha256 for name, file in files.items() if name.endswith(".safetensors")},
            outline=self.plan.outline,
            hf_config=dict(self.hf_config),
            schemes=self.plan.schemes(),
            seed=None if written else source.seed,
            taken=self._sources.quantized is not None,
            ranks=self.spec.parallel.tensor_parallel_size,
            stages=self.plan.stages,
        )

    def _trace_request(self, step: Step) -> TraceRequest:
        assert step.bucket is not None
        assert step.kind is not None
        return TraceRequest(
            hf_config=dict(self.hf_config),
            schemes=self.plan.schemes(),
            cuts={name: p.cut for name, p in self.plan.outline.parameters.items() if p.cut is not None},
            ranks=self.spec.parallel.tensor_parallel_size,
            segment=step.kind.segment,
            bucket=(step.bucket.batch, step.bucket.query, step.bucket.context),
            last_token_only=self.spec.model.calculate_logit_only_for_last_token,
        )

    def _compile_request(self, step: Step) -> compile.CompileRequest:
        assert step.kind is not None
        inputs = {compile.GRAPHS: self._record(_trace_of(step)).outputs[trace.OUTPUT].sha256}
        prefixes = None
        if self.spec.rewriting.embed_all_constants_into_graph:
            [use] = step.kind.uses
            parameters = self._record("partition:weights").outputs
            of_stage = {
                name: file.sha256 for name, file in parameters.items() if name.startswith(f"stage-{use.stage}-")
            }
            inputs |= {f"{compile.CONSTANTS}{name}": sha256 for name, sha256 in of_stage.items()}
            prefixes = [f"{self.plan.outline.layer_prefix}{layer}." for layer in use.layers]
        return compile.CompileRequest(
            inputs=inputs,
            backend=self.spec.backend.name,
            isa=self.plan.isa,
            options=dict(self.spec.backend.compiler_config_overrides),
            core_aten=self.spec.rewriting.do_decompositions_for_model_rewrite,
            layer_prefixes=prefixes,
        )

    def _package(self, output: Path) -> None:
        built, others = self._built(self.plan), self._model_files()
        model_directory = output / "model"
        model_directory.mkdir()
        directory = self._sources.unchanged_directory(others.files, others.revision) if others.files else None
        package.copy_model_files(directory, others, self.hf_config, model_directory)
        model_files = {path.name: package.file_record(path.read_bytes()) for path in sorted(model_directory.iterdir())}
        draft = None
        if self.draft is not None:
            assert self.plan.draft is not None
            draft = self.draft._built(self.plan.draft)
        package.write(package.package(built, model_files, self._tools("package"), draft), output)

    def _built(self, plan: Plan) -> package.BuiltModel:
        """What the steps have made of this model. `plan` is that of the artifact that it is for."""
        embeds = self.spec.rewriting.embed_all_constants_into_graph
        programs = []
        for step in self.plan.steps.values():
            if step.action == "compile" and self._origin(step.name)[0] is self:
                assert step.bucket is not None
                assert step.kind is not None
                made = self._record(step.name).outputs
                cut = self.store.read_json(self._record(_trace_of(step)), trace.OUTPUT)
                for number, (graph, collectives) in enumerate(zip(cut["parts"], cut["collectives"], strict=True)):
                    location = self.backend.locate(number)
                    output_of = made[location.file]
                    record = FileRecord(size=output_of.size, sha256=output_of.sha256)
                    if embeds:
                        graph["inputs"] = [spec for spec in graph["inputs"] if spec["role"] != "parameter"]
                    programs.append(
                        package.BuiltProgram(step.bucket, step.kind, number, location, record, graph, collectives)
                    )
        parameters = {
            name: FileRecord(size=made.size, sha256=made.sha256)
            for name, made in ({} if embeds else self._record("partition:weights").outputs).items()
        }
        return package.BuiltModel(plan, programs, parameters, self._source(), self._model_files())

    def _publish(self) -> None:
        manifest, directory = self._manifest(), self.version_directory
        hashes = self.store.hashes
        if writer.is_published(directory, manifest, hashes.hash):
            return
        by_digest = {
            output.sha256: self.store.path(output)
            for done in self.done.values()
            for output in done.record.outputs.values()
        }
        files = {path: by_digest[file.sha256] for path, file in manifest.files.items()}
        if writer.publish(directory, manifest, files, hashes.hash, hashes.remember):
            self.store.tell(f"the signature of {directory} is removed: it is not of these files; sign it again")

    def _accept(self) -> None:
        figures = self.store.path(self._record("qualify").outputs[qualify.OUTPUT])
        writer.write_qualification(self.version_directory, figures.read_bytes())
        writer.point_latest_to(self.version_directory)

    def _qualification_file(self) -> Path:
        return writer.qualification_file(self.version_directory)

    def _record(self, name: str) -> ActionRecord:
        record = self._find(name)
        if record is None:
            raise StepError(self._full(name), "its output is not in the store; build again")
        return record

    def _manifest(self) -> Manifest:
        return Manifest.model_validate(self.store.read_json(self._record("package"), MANIFEST_FILE))

    def _source(self) -> listing.Source:
        return listing.Source.model_validate(self.store.read_json(self._record("fetch"), listing.WEIGHTS))

    def _model_files(self) -> listing.ModelFiles:
        return listing.ModelFiles.model_validate(self.store.read_json(self._record("fetch"), listing.MODEL_FILES))

    def _outline(self) -> Outline:
        factors = self._factors_of("survey", {"hf_config": dict(self.hf_config)}, {})
        key = key_of(factors)
        record = self.store.find(key)
        if record is None:
            request = SurveyRequest(hf_config=dict(self.hf_config))
            self.events.emit(SurveyStarted())
            with _failing("survey"):
                kind, log = steps.find("survey"), self.store.log_path("survey")
                inputs = Inputs({}, self.store.scratch("survey"))
                record, _ = self.store.obtain(
                    key,
                    "survey",
                    factors,
                    lambda output: self._pools.builders.run("survey", kind, request, inputs, output, log),
                )
        return Outline.model_validate(self.store.read_json(record, survey.OUTPUT))


class _Pools:
    """The worker processes of a build."""

    def __init__(self, options: BuildOptions) -> None:
        self.builders = Pool(options.num_pipeline_builder_workers)
        self.compilers = Pool(options.num_compile_workers)


@contextmanager
def _of_draft(name: str) -> Iterator[None]:
    """Mistakes are those of the draft model called `name`."""
    try:
        yield
    except UserError as error:
        raise UserError(
            error.what, where=f"draft {name!r}: {error.where}", valid=error.valid, hint=error.hint
        ) from error


def _trace_of(compiling: Step) -> str:
    """The step whose graphs a compile step takes."""
    [name] = [name for name in compiling.needs if name != "partition:weights"]
    return name


def _watched(work: Callable[[Path], None]) -> Callable[[Path], Made]:
    """Work that is done in this process: the memory is the process's, whatever else it does meanwhile."""

    def watched(output: Path) -> Made:
        with Watch() as watch:
            work(output)
        return Made(peak=watch.peak)

    return watched


@contextmanager
def _failing(step: str) -> Iterator[None]:
    """A disk that is full or cannot be written makes a step fail, and so does an interruption."""
    try:
        yield
    except Cancelled as error:
        raise StepError(step, "the build was interrupted") from error
    except OSError as error:
        raise StepError(step, f"{type(error).__name__}: {error}") from error


def open_build(name: str, overrides: list[str], cwd: Path | None = None, listeners: Iterable[Listener] = ()) -> Build:
    """The build of the recipe of that name, as `open_recipe`."""
    return open_recipe(load_recipe(name, overrides, cwd=cwd), cwd, listeners)


def open_recipe(recipe: Recipe, cwd: Path | None = None, listeners: Iterable[Listener] = ()) -> Build:
    """The build of a recipe. Raises UserError for every mistake that can be seen before work starts."""
    build = Build(recipe, cwd, listeners=listeners)
    try:
        _ = build.plan  # An architecture that cannot be built is refused here.
    except BaseException:
        build.close()
        raise
    return build
