"""Plans the steps of a build from its models: a pure function, no I/O, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furiosa_build.plan.kinds import Kind
from furiosa_build.plan.kv_blocks import KvBlocks, find_kv_blocks
from furiosa_build.plan.model import DRAFT, Bucket, ModelPlan, step_name

if TYPE_CHECKING:
    from furiosa_build.steps.base import Step


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """Where in a plan a step is planned.

    Attributes:
        models: The models of the artifact, by id.
        model_id: The model that the step is for; a step for the artifact is for the model itself.
        kv_blocks: KV blocks of a layer.
        before: The steps that are planned already, by name.
        bucket: The shape that it is for, where steps are planned for each program.
        kind: The kind of supertask that it is for, likewise.
    """

    models: Mapping[str, ModelPlan]
    model_id: str
    kv_blocks: int
    before: Mapping[str, PlannedStep]
    bucket: Bucket | None = None
    kind: Kind | None = None

    @property
    def model(self) -> ModelPlan:
        """The model that the step is for."""
        return self.models[self.model_id]

    @property
    def program(self) -> tuple[Bucket, Kind]:
        """The shape and the kind of supertask, of a step that is planned for each program."""
        assert self.bucket is not None
        assert self.kind is not None
        return self.bucket, self.kind

    @property
    def program_text(self) -> str:
        """What such a step is about: `block of decode-1x512 (4 layers)`."""
        bucket, kind = self.program
        return f"{kind.name} of {bucket.name}" + (f" ({len(kind.layers)} layers)" if kind.layers else "")

    def name_of(self, own_name: str) -> str:
        """The name of another step for the same model."""
        return step_name(self.model_id, own_name)

    def maker(self, product: str) -> str:
        """The name of the step that `product` of this model is taken from: the last of those that make it."""
        own = (step for step in self.before.values() if step.model_id == self.model_id)
        return [step.name for step in own if step.type.makes == product][-1]


@dataclass(frozen=True, eq=False, repr=False)
class PlannedStep:
    """One node of the build graph.

    Attributes:
        type: The kind of step.
        site: Where it stands in the plan.
        own_name: Its name among the steps of its model, such as `compile:decode-1x512:block`.
        description: One line for listings.
        needs: Steps whose outputs it consumes, by name, and which files of them: a shell pattern.
        reads: What it reads of the BuildSpec and the outline: part of its key.
    """

    type: Step[Any]
    site: Site
    own_name: str
    description: str
    needs: Mapping[str, str]
    reads: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name in the plan, which is the doit task's."""
        return step_name(self.site.model_id, self.own_name)

    @property
    def action(self) -> str:
        """The name of its kind; all steps of a kind run the same code."""
        return self.type.name

    @property
    def model_id(self) -> str:
        """The id of the model that it is for."""
        return self.site.model_id

    @property
    def model(self) -> ModelPlan:
        """The model that it is for."""
        return self.site.model

    @property
    def bucket(self) -> Bucket | None:
        """The shape that it is for; None where it is for all."""
        return self.site.bucket

    @property
    def kind(self) -> Kind | None:
        """The kind of supertask that it is for; None where it is for all."""
        return self.site.kind

    @property
    def schemes(self) -> set[str]:
        """The schemes of the quantized parameters that it is about: all of the model's, or those of its supertask."""
        if self.kind is None:
            return set(self.model.schemes.values())
        return {*self.kind.schemes.values(), *(s for block in self.kind.blocks for s in block.schemes.values())}

    def name_for(self, other: PlannedStep) -> str:
        """What `other`, which needs this step, calls it in its key: a model's steps have the same keys everywhere."""
        return self.own_name if self.model_id == other.model_id else self.name


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What is built.

    Attributes:
        models: By id: the model itself (""), and its `draft` if it has one.
        kv_blocks: KV blocks of a layer. A draft model has as many: a sequence takes as many of each.
        steps: By name, in an order in which they can run.
    """

    models: Mapping[str, ModelPlan]
    kv_blocks: KvBlocks
    steps: Mapping[str, PlannedStep]

    @property
    def model(self) -> ModelPlan:
        """The model itself."""
        return self.models[""]

    @property
    def draft(self) -> ModelPlan | None:
        """The draft model, if there is one."""
        return self.models.get(DRAFT)


def make_plan(models: Mapping[str, ModelPlan], kinds: Iterable[Step[Any]]) -> Plan:
    """Plans the build of an artifact with these models, by id, of these kinds of step, in their order."""
    kinds = list(kinds)
    blocks = find_kv_blocks(models[""], models.get(DRAFT))
    steps: dict[str, PlannedStep] = {}

    def add(scope: str, site: Site) -> None:
        for kind in kinds:
            if kind.scope == scope and kind.applies(site):
                planned = PlannedStep(kind, site, *kind.plan(site))
                steps[planned.name] = planned

    for model_id, model in models.items():
        add("model", Site(models, model_id, blocks.count, steps))
        for bucket, group in model.kinds.items():
            for kind in group:
                add("program", Site(models, model_id, blocks.count, steps, bucket, kind))
    add("artifact", Site(models, "", blocks.count, steps))
    return Plan(models, blocks, steps)
