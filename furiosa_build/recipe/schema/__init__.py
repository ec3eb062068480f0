"""What a recipe may say: a file for each section, BuildSpec with the rules across sections, and Recipe.

Field names are those of the ArtifactBuilder API; the sections are the config groups of `conf/`. So a field is
spelled the same in a recipe, as an override on the command line and in Python.
"""

from furiosa_build.recipe.schema.architecture import check_architecture
from furiosa_build.recipe.schema.buckets import AppendSize, BucketSpec, Phase, bucket_name, derive_append_buckets
from furiosa_build.recipe.schema.model import ModelSpec
from furiosa_build.recipe.schema.parallel import ParallelSpec
from furiosa_build.recipe.schema.qualify import QualifySpec
from furiosa_build.recipe.schema.quantization import QuantizationRule, QuantizationSpec, Scheme
from furiosa_build.recipe.schema.recipe import BuildOptions, Recipe
from furiosa_build.recipe.schema.rewriting import RewritingSpec
from furiosa_build.recipe.schema.scheduler import SchedulerConfig
from furiosa_build.recipe.schema.spec import BuildSpec
from furiosa_build.recipe.schema.speculative import DEFAULT_SPECULATIVE_TOKENS, SpeculativeSpec
from furiosa_build.recipe.schema.target import BackendSpec, TargetSpec

__all__ = [
    "DEFAULT_SPECULATIVE_TOKENS",
    "AppendSize",
    "BackendSpec",
    "BucketSpec",
    "BuildOptions",
    "BuildSpec",
    "ModelSpec",
    "ParallelSpec",
    "Phase",
    "QualifySpec",
    "QuantizationRule",
    "QuantizationSpec",
    "Recipe",
    "RewritingSpec",
    "SchedulerConfig",
    "Scheme",
    "SpeculativeSpec",
    "TargetSpec",
    "bucket_name",
    "check_architecture",
    "derive_append_buckets",
]
