"""Asks an artifact and transformers the same questions, and refuses what differs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.artifact.schema import ARTIFACT_FILE, Artifact
from furiosa_build.core.errors import StepError
from furiosa_build.core.system import this_machine
from furiosa_build.ir.kv_cache import kv_cache_dtype_of
from furiosa_build.plan.budget.reference import LENGTHS, working_bytes
from furiosa_build.runtime.probe import Questions
from furiosa_build.steps.qualification import beams, texts
from furiosa_build.steps.qualification.answers import Answers
from furiosa_build.steps.qualification.cache_rounding import CacheRounding
from furiosa_build.steps.qualification.explain import differing_parameters, explain
from furiosa_build.steps.qualification.logits import compare
from furiosa_build.steps.qualification.original import Original, OriginalTokenizer
from furiosa_build.steps.qualification.original_model import LayeredOriginalModel, OriginalModel
from furiosa_build.steps.qualification.quality import Quality, quality, windows
from furiosa_build.steps.qualification.questions import make_questions, passage
from furiosa_build.steps.qualification.reference import Reference
from furiosa_build.steps.qualification.rounded import RoundedModel
from furiosa_build.steps.qualification.stored import StoredModel
from furiosa_build.steps.weights import open_weights, weight_files
from furiosa_build.weights.config import respelled
from furiosa_build.weights.hf_layout import read_json

if TYPE_CHECKING:
    from furiosa_build.steps.qualify import Case
    from furiosa_build.weights.source import TensorSource

Ask = Callable[[Questions], Path]
"""Has the artifact answer questions; gives the file of its answers."""


class Judge:
    """Judges an artifact."""

    def __init__(self, case: Case) -> None:
        self._case, self._request = case, case.request

    def judge(self, ask: Ask) -> dict[str, Any]:
        """How the artifact qualifies. Raises StepError when it does not, with what differs and where."""
        described = Artifact.model_validate_json((self._case.artifact / ARTIFACT_FILE).read_bytes())
        held = kv_cache_dtype_of(described.kv_cache[0].dtype)
        with nullcontext() if held == "auto" else CacheRounding(held) as rounding:
            return self._judge(ask, described, rounding)

    def _judge(self, ask: Ask, described: Artifact, rounding: CacheRounding | None) -> dict[str, Any]:
        changed = self._request.hf_config if self._request.changes_config else self._respelled()
        original = Original(self._case.source, self._case.work / "source", changed, self._request.hub_name)
        tokenizer = original.tokenizer() if self._request.has_tokenizer else None
        asked = make_questions(described, tokenizer, self._longest)
        answers = Answers(ask(asked))
        if found := texts.differences(asked, answers.told, tokenizer):
            raise StepError("qualify", "the artifact does not read and write as its source: " + "\n".join(found))
        model = self._model(original)
        reference, cost = self._reference(model, described, tokenizer, rounding)
        comparison = compare(answers.continued, reference, self._request.limits.logit_tolerance)
        if comparison.wrong:
            parameters = differing_parameters(self._request, self._stored, model)
            raise StepError("qualify", explain(comparison, asked, ask, reference, parameters))
        prompts = [each.prompt for one in asked.rounds for each in one]
        allowed = float(comparison.figures["allowed_logit_difference"])
        if wrong := list(beams.differences(answers.searched, prompts, reference, model, allowed)):
            raise StepError("qualify", "the artifact's beams are not the model's: " + wrong[0])
        if cost is not None and (beyond := cost.beyond(self._request.limits)):
            raise StepError("qualify", "quantization costs more than the recipe allows: " + "; ".join(beyond))
        told = {name: answers.told[name] for name in ("draft_acceptance",) if name in answers.told}
        return {**comparison.figures, **({} if cost is None else cost.figures), **told}

    def _model(self, original: Original) -> OriginalModel | None:
        """The source's model by transformers; None: no source has its weights, they are drawn or quantized already."""
        if not self._files:
            return None
        loaded = OriginalModel if self._is_whole else LayeredOriginalModel
        return loaded(original.directory, self._request.outline.layer_prefix.removesuffix("."))

    def _reference(
        self,
        model: OriginalModel | None,
        artifact: Artifact,
        tokenizer: OriginalTokenizer | None,
        rounding: CacheRounding | None,
    ) -> tuple[Reference, Quality | None]:
        """What logits are compared with; and what quantization costs, where the published model can be had as well."""
        request, schemes = self._request, self._request.schemes
        if model is None:
            stored: Reference = StoredModel(request.hf_config, request.outline, schemes, self._stored)
            return stored if rounding is None else rounding.of(stored), None
        if not schemes and rounding is None:
            return model, None
        text = self._case.text.read_text(encoding="utf-8") if self._case.text else None
        metadata = artifact.model_metadata
        read = windows(passage(text, tokenizer, metadata.vocab_size), metadata.num_parameters, metadata.vocab_size)
        with nullcontext() if rounding is None else rounding.left_out():
            published = model.run(read)
        rounded: Reference = model
        if schemes:
            rounded = RoundedModel(model, request.outline, schemes, self._stored, self._keeps_rounded)
        if rounding is not None:
            rounded = rounding.of(rounded)
        return rounded, quality(read, published, [each.logits for each in rounded.logits(read)])

    def _respelled(self) -> dict[str, Any] | None:
        """The source's config.json, if it has fields that transformers does not read as they are written; else None."""
        if "config.json" not in self._case.source:
            return None
        config = read_json(self._case.source["config.json"])
        fields = respelled(config, self._request.outline.dtype)
        return {**config, **fields} if fields else None

    @cached_property
    def _stored(self) -> TensorSource:
        """The weights as the build reads them."""
        return open_weights(self._request, self._case.weights)

    @cached_property
    def _files(self) -> list[Path]:
        """The source's files of weights."""
        return [path for name, path in weight_files(self._case.source).items() if name.endswith(".safetensors")]

    # What the memory has room for.

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest prompt."""
        outline, hf_config = self._request.outline, self._request.hf_config
        return next((n for n in LENGTHS if working_bytes(outline, hf_config, n) < self._room / 2), LENGTHS[-1])

    @property
    def _is_whole(self) -> bool:
        """Whether transformers can have the whole model of the source, to run each sequence alone."""
        return self._whole < self._room

    @property
    def _keeps_rounded(self) -> bool:
        """Whether there is room for all dequantized weights beside it."""
        parameters = self._request.outline.parameters
        return self._whole + sum(parameters[name].layout.nbytes for name in self._request.schemes) < self._room

    @cached_property
    def _whole(self) -> int:
        """Bytes of the whole model and of what it computes. Mapped, it would be read anew for each sequence."""
        outline = self._request.outline
        parameters = sum(parameter.layout.nbytes for parameter in outline.parameters.values())
        return parameters + working_bytes(outline, self._request.hf_config, self._longest)

    @cached_property
    def _room(self) -> float:
        available = this_machine().available
        return float("inf") if available is None else _SHARE_OF_MEMORY * available


_SHARE_OF_MEMORY = 0.7
"""Of what is available; the rest is for what else there is to hold, and for the process that runs the artifact."""
