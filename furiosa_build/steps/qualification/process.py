"""The process in which transformers judges an artifact: `python -m furiosa_build.steps.qualification.process CASE OUT`.

CASE is a JSON file, `Case`; OUT is one too, `Verdict`. It is a process of its own so that its memory is the system's
again when it ends, and that its end, whatever the cause, leaves a message. It ends with its parent: when its standard
input does.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.core.errors import BuildError, StepError
from furiosa_build.core.failpoints import doing, reach
from furiosa_build.core.progress import metered
from furiosa_build.steps.qualification.asking import Asking
from furiosa_build.steps.qualify import Case, Verdict

if TYPE_CHECKING:
    from furiosa_build.steps.qualification.judge import Ask


def judge(case: Case, ask: Ask) -> Verdict:
    """Judges an artifact that answers as `ask` says."""
    from furiosa_build.steps.qualification.judge import Judge

    reach("mid-judge")
    try:
        return Verdict(figures=Judge(case).judge(ask))
    except StepError as error:
        return Verdict(refusal=error.cause)
    except BuildError as error:
        return Verdict(refusal=str(error))


def main(case: Path, verdict: Path) -> None:
    """Reads the case, and writes the verdict."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    found = Case.model_validate_json(case.read_bytes())
    with doing("qualify"), metered(found.counted), Asking(found.artifact, found.work) as asking:
        verdict.write_text(judge(found, asking.ask).model_dump_json())


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not by sys.stdin, whose lock would be held when this process ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
