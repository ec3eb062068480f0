from __future__ import annotations

import json
import math

from furiosa_build.core.python_floats import with_floats, without_floats

ODD = {"a": [0.0, math.inf, {"b": -math.inf}], "c": 1.5, "d": None, "e": {"__float__": "other"}}


def test_data_comes_back_through_strict_json() -> None:
    strict = json.dumps(without_floats(ODD), allow_nan=False)
    assert with_floats(json.loads(strict)) == ODD
    assert math.isnan(with_floats(without_floats(math.nan)))
