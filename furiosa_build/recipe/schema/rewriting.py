"""Section `rewriting`: how a model becomes programs."""

from __future__ import annotations

from pydantic import model_validator

from furiosa_build.recipe.schema.section import PositiveInt, Section, invalid


class RewritingSpec(Section):
    """How the model is rewritten into programs.

    Attributes:
        use_blockwise_compile: Layers are compiled apart from what comes before and after them, and equal layers only
            once. Otherwise each stage is one program.
        num_blocks_per_supertask: Layers that run as one program.
        do_decompositions_for_model_rewrite: Graphs call operators of core ATen only (and write the KV cache in place).
        embed_all_constants_into_graph: Parameters are constants inside the programs instead of files of their own. A
            program then serves one supertask only.
        add_prefill_last_block_slice: What follows attention in the last layer of prefill is computed for the last token
            of a prompt only.
    """

    use_blockwise_compile: bool = True
    num_blocks_per_supertask: PositiveInt = 1
    do_decompositions_for_model_rewrite: bool = False
    embed_all_constants_into_graph: bool = False
    add_prefill_last_block_slice: bool = False

    @model_validator(mode="after")
    def _has_an_effect(self) -> RewritingSpec:
        if self.num_blocks_per_supertask > 1 and not self.use_blockwise_compile:
            what = f"num_blocks_per_supertask={self.num_blocks_per_supertask}: a stage is one program"
            raise invalid(what, key=("num_blocks_per_supertask",), valid="1, or use_blockwise_compile=true")
        return self
