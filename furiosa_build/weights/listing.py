"""What `fetch` writes: which weights are used, the files that travel beside them, and all that there is for others.

None says where they lie. Several files, so that another tokenizer or chat template does not count as other weights.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from furiosa_build.ir.outline import ParameterOutline

WEIGHTS = "weights.json"
MODEL_FILES = "model_files.json"
ORIGINAL = "original.json"


class ListedFile(BaseModel):
    """Size in bytes and sha256 (hex)."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    size: int
    sha256: str


class ListedWeights(BaseModel):
    """weights.json: the safetensors files and their index; or, for random weights, what is drawn from `seed`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    files: dict[str, ListedFile] = {}
    seed: int | None = None
    parameters: dict[str, ParameterOutline] = {}


class ModelFiles(BaseModel):
    """model_files.json: tokenizer, generation config, chat template; and the commit of a model on the hub."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    files: dict[str, ListedFile] = {}
    revision: str | None = None


class Original(BaseModel):
    """original.json: every file of the model that transformers may open, whether the build uses it or not.

    `qualify` gives them to transformers, which decides for itself. `texts` are those to measure the model on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    files: dict[str, ListedFile] = {}
    texts: ListedFile | None = None
